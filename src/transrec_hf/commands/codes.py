"""`transrec codes`: a data set whose items have codes, fitted on their vectors or shared with another platform."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import set_seed
from transformers.utils import logging

from ..data.catalogue import Catalogue
from ..errors import DataError, bad_input
from ..files import write_json, written_whole
from ..items.codes import ItemQuantizer, check_codebooks
from ..items.encoding import encode_catalogue
from ..items.meeting import standardize_for
from ..items.preparing import ItemSource
from ..items.semantic_ids import (
    LETTERS,
    SEMANTIC_IDS_NAME,
    codes_of,
    collision_rate,
    resolve_collisions,
    save_semantic_ids,
)
from ..model.modeling_transrec import TransRecModel
from ..model.processing_transrec import TransRecProcessor
from ..publishing.checkpoint import check_place, load_checkpoint
from ..publishing.dataset import INTERACTIONS_NAME, ITEMS_NAME, write_interactions, write_items
from ..serving.index import encoder_hash
from .options import DataArguments, fit_to, option
from .parsing import parse_arguments


logger = logging.get_logger(__name__)

REPORT_NAME = "item_quantizer.json"


@dataclass
class CodesArguments:
    """Which vectors become codes, and how."""

    _argument_group_name = "codes"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model, whose item vectors become codes.")
    text_model: str | None = option(None, "Folder or Hub id of a text encoder, instead of a model.")
    vision_model: str | None = option(None, "Folder or Hub id of an image encoder, instead of a model.")
    output_dir: str | None = option(None, "Folder for the data set with codes.")
    semantic_ids: str | None = option(None, "JSON file with codes that another program made, instead of a model.")
    quantizer: str | None = option(None, "Folder of the quantizer of another platform [a new one is fitted].")
    method: Literal["residual", "product", "learned"] = option("residual", "How codes are made; see docs/codes.md.")
    num_codebooks: int = option(4, "Number of codes of an item.")
    codebook_size: int = option(256, "Number of values of a code.")
    rotations: int = option(5, "For the method product: how often its rotation is fitted; 0 for no rotation.")
    seed: int = option(0, "Seed of the quantizer.")
    batch_size: int = option(128, "Items encoded at a time.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")


def codes(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Describe each item of a platform by codes: a few whole numbers, which models can read instead of content.

        transrec codes my_source --text_model sentence-transformers/all-MiniLM-L6-v2 --output_dir my_source_codes
        transrec codes my_target --text_model sentence-transformers/all-MiniLM-L6-v2 --output_dir my_target_codes \\
            --quantizer my_source_codes                      # the same codes mean the same on both
        transrec pretrain my_source_codes --num_codebooks 4
        transrec codes my_source --semantic_ids ids.json --output_dir their_codes      # {"item": ["<a_3>", "<b_0>"]}

    The folder output_dir then holds the items with a column `codes`, the interactions, the quantizer, a report on how
    much information the codes lose (item_quantizer.json), and semantic_ids.json, in which no two items have the same
    codes if they are at most 25.
    """
    data_args, args = parse_arguments((DataArguments, CodesArguments), argv, codes, positional="data")
    if not args.output_dir:
        raise DataError("there is no folder for the codes: give --output_dir")
    folder = Path(args.output_dir)
    if (folder / ITEMS_NAME).exists():
        raise DataError(f"{folder}: holds {ITEMS_NAME} already. Choose another --output_dir, or delete it.")
    if args.semantic_ids and (args.quantizer or args.checkpoint or args.text_model or args.vision_model):
        raise DataError("--semantic_ids has the codes already: leave out the quantizer and the model")
    given = ItemQuantizer.from_pretrained(args.quantizer) if args.quantizer else None
    catalogue, sequences = data_args.load()
    if args.semantic_ids:
        quantizer, found = None, codes_of(catalogue.item_ids, args.semantic_ids)
        shape = {"num_codebooks": found.shape[1], "codebook_size": int(found.max()) + 1}
        report: dict[str, Any] = {"items": len(catalogue), **shape, "collision_rate": collision_rate(found)}
    else:
        quantizer, vectors = quantize(args, catalogue, given)
        found = quantizer.encode(vectors)
        report = {"items": len(catalogue), "width": quantizer.size, **quantizer.report(vectors)}
    with written_whole(folder) as partial:
        write_items(catalogue.with_codes(found.numpy()), partial / ITEMS_NAME)
        write_interactions(catalogue, sequences, partial / INTERACTIONS_NAME)
        write_json(partial / REPORT_NAME, report)
        if quantizer is not None:
            quantizer.save(partial)
            unique = resolve_collisions(found) if found.shape[1] < len(LETTERS) else found
            save_semantic_ids(partial / SEMANTIC_IDS_NAME, catalogue.item_ids, unique)
    print(json.dumps(report, indent=2))
    logger.info("Items with %s codes are in %s", found.shape[1], folder)
    return report


def quantize(
    args: CodesArguments, catalogue: Catalogue, quantizer: ItemQuantizer | None
) -> tuple[ItemQuantizer, torch.Tensor]:
    """The quantizer, which is fitted if there is none, and the item vectors."""
    set_seed(args.seed)
    model, processor = load_encoder(args)
    if args.checkpoint:
        fit_to(catalogue, model, args.checkpoint)
    made_by, width = encoder_hash(model, processor), model.config.hidden_size
    if quantizer is not None:
        check_encoder(quantizer, made_by, str(args.quantizer))
    else:
        with bad_input("bad options"):
            check_codebooks(len(catalogue), width, args.num_codebooks, args.codebook_size, args.method)
    catalogue.check_contents(model.config.modalities)
    source = ItemSource(catalogue, processor)
    if torch.accelerator.is_available() and not args.use_cpu:
        model.to(torch.accelerator.current_accelerator())
    standardize_for(model, source, args.seed)
    vectors = encode_catalogue(model, source, batch_size=args.batch_size)[:, :width].cpu()
    if quantizer is None:
        sizes = (args.num_codebooks, args.codebook_size, args.method)
        options: dict[str, Any] = {"rotations": args.rotations, "seed": args.seed, "encoder_hash": made_by}
        with bad_input("bad options"):
            quantizer = ItemQuantizer.fit(vectors, *sizes, **options)
    return quantizer, vectors


def load_encoder(args: CodesArguments) -> tuple[TransRecModel, TransRecProcessor | None]:
    """The model whose vectors become codes, and its processor."""
    towers: dict[str, Any] = {name: getattr(args, name) for name in ("text_model", "vision_model")}
    towers = {name: tower for name, tower in towers.items() if tower}
    if bool(towers) == bool(args.checkpoint):
        raise DataError(
            "there is no model to make vectors with: give --checkpoint, or --text_model, --vision_model or both"
        )
    if args.checkpoint:
        return load_checkpoint(args.checkpoint)
    for tower in towers.values():
        check_place(tower)
    with bad_input(" and ".join(f"{name} {tower}" for name, tower in towers.items())):
        return TransRecModel.from_text_vision_pretrained(**towers), TransRecProcessor.from_towers(**towers)


def check_encoder(quantizer: ItemQuantizer, made_by: str, name: str) -> None:
    """Raises [`DataError`] if a quantizer was fitted on the vectors of another model."""
    if quantizer.encoder_hash not in (None, made_by):
        raise DataError(
            f"{name}: this quantizer was fitted on the vectors of another model ({str(quantizer.encoder_hash)[:12]}) "
            f"than the given one ({made_by[:12]}), so its codes would mean nothing. Give the model of the quantizer "
            "and the same --seed, or leave out --quantizer to fit a new one."
        )
