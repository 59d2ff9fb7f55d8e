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

from ..data.contents import QUANTIZER_NAME
from ..errors import DataError, bad_input
from ..files import write_json, written_whole
from ..items.codes import ItemQuantizer, check_codebooks
from ..items.encoding import encode_catalogue
from ..items.meeting import standardize_for
from ..items.preparing import ItemSource
from ..items.semantic_ids import LETTERS, SEMANTIC_IDS_NAME, resolve_collisions, save_semantic_ids
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

    The folder output_dir then holds the items with a column `codes`, the interactions, the quantizer, a report on how
    much information the codes lose (item_quantizer.json), and semantic_ids.json, in which no two items have the same
    codes.
    """
    data_args, args = parse_arguments((DataArguments, CodesArguments), argv, codes, positional="data")
    if not args.output_dir:
        raise DataError("there is no folder for the codes: give --output_dir")
    folder = Path(args.output_dir)
    if (folder / ITEMS_NAME).exists():
        raise DataError(f"{folder}: holds {ITEMS_NAME} already. Choose another --output_dir, or delete it.")
    given = ItemQuantizer.from_pretrained(args.quantizer) if args.quantizer else None
    catalogue, sequences = data_args.load()
    set_seed(args.seed)
    model, processor = load_encoder(args)
    if args.checkpoint:
        fit_to(catalogue, model, args.checkpoint)
    made_by = encoder_hash(model, processor)
    if given is not None:
        check_encoder(given, made_by, str(args.quantizer))
    else:
        width = model.config.hidden_size
        with bad_input("bad options"):
            check_codebooks(len(catalogue), width, args.num_codebooks, args.codebook_size, args.method)
    catalogue.check_contents(model.config.modalities)
    source = ItemSource(catalogue, processor)
    if torch.accelerator.is_available() and not args.use_cpu:
        model.to(torch.accelerator.current_accelerator())
    standardize_for(model, source, args.seed)
    vectors = encode_catalogue(model, source, batch_size=args.batch_size)[:, : model.config.hidden_size].cpu()
    with bad_input("bad options"):
        quantizer = given or ItemQuantizer.fit(
            vectors,
            args.num_codebooks,
            args.codebook_size,
            args.method,
            rotations=args.rotations,
            seed=args.seed,
            encoder_hash=made_by,
        )
    found = quantizer.encode(vectors)
    report = {"items": len(catalogue), "width": quantizer.size, **quantizer.report(vectors)}
    with written_whole(folder) as partial:
        write_items(catalogue.with_codes(found.numpy()), partial / ITEMS_NAME)
        write_interactions(catalogue, sequences, partial / INTERACTIONS_NAME)
        quantizer.save(partial)
        write_json(partial / REPORT_NAME, report)
        if found.shape[1] < len(LETTERS):
            save_semantic_ids(partial / SEMANTIC_IDS_NAME, catalogue.item_ids, resolve_collisions(found))
    print(json.dumps(report, indent=2))
    logger.info("%s and items with %s codes are in %s", QUANTIZER_NAME, found.shape[1], folder)
    return report


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
