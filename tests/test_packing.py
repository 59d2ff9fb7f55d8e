"""An index in fewer bytes: what comes back is near, serves the same model, and is refused where it would be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import make_catalogue, make_model, make_processor

from transrec_hf import DataError, ItemIndex, Recommender
from transrec_hf.commands.index import index as index_command
from transrec_hf.items.codes import ItemQuantizer
from transrec_hf.publishing.checkpoint import save_checkpoint
from transrec_hf.serving.packing import PACKED_NAME, pack_index, packed, unpack_index, unpacked


WIDTH = 16


def unit(num: int = 300) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.parametrize(
    ("form", "least", "most"), [("fp16", 0.9999, 32), ("int8", 0.999, 20), ("codes", 0.9, 8), ("prefix", 0.5, 32)]
)
def test_what_comes_back_is_near_and_smaller(form, least, most):
    vectors = unit()
    quantizer = ItemQuantizer.fit(vectors, 8, 256, "product", rotations=0) if form == "codes" else None
    parts = packed(vectors, form, 8, quantizer)
    back = unpacked(parts, "product", is_unit=True)
    torch.testing.assert_close(back.norm(dim=1), torch.ones(len(back)))
    assert (back * vectors).sum(dim=1).mean() > least
    assert (
        sum(part.nbytes for part in parts.values() if part.ndim and len(part) == len(vectors)) / len(vectors) <= most
    )


def test_a_quantizer_of_other_vectors_is_refused():
    quantizer = ItemQuantizer.fit(unit(), 4, 16, "product")
    with pytest.raises(DataError, match="fitted on other vectors"):
        packed(unit() + 1, "codes", quantizer=quantizer)
    with pytest.raises(DataError, match="1 to 15 numbers, got 16"):
        packed(unit(), "prefix", 16)
    with pytest.raises(DataError, match="form must be one of"):
        packed(unit(), "zip")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    design = {"item_map": "whitened", "similarity": "cosine", "content_prior": True, "popularity_prior": True}
    save_checkpoint(folder / "model", make_model(modalities="text", **design), make_processor(("text",)))
    catalogue = make_catalogue(40, kinds=("text",))
    Recommender.from_pretrained(folder / "model", catalogue, index=folder / "index")
    return folder


@pytest.mark.parametrize("form", ["fp16", "int8", "prefix"])
def test_an_unpacked_index_serves_its_model(form, workplace, tmp_path):
    place = ["--checkpoint", str(workplace / "model"), "--form", form, "--size", "12"]
    taken = index_command(["pack", str(workplace / "index"), *place, "--output_dir", str(tmp_path / "small")])
    assert taken < 4 * WIDTH
    assert index_command(["unpack", str(tmp_path / "small"), "--output_dir", str(tmp_path / "big")]) == 40
    whole, back = (ItemIndex.from_pretrained(each / name) for each, name in ((workplace, "index"), (tmp_path, "big")))
    assert back.encoder_hash == whole.encoder_hash and back.item_ids.tolist() == whole.item_ids.tolist()
    assert torch.equal(back.item_embeds[:, WIDTH:], whole.item_embeds[:, WIDTH:])
    assert not torch.equal(back.item_embeds, whole.item_embeds)
    back.verify()
    served = Recommender.from_pretrained(workplace / "model", index=tmp_path / "big")
    assert len(served.recommend(["item-2", "item-0"], k=3)) == 3


def test_an_index_is_packed_by_its_own_model(workplace, tmp_path):
    other = make_model(seed=1, modalities="text", item_map="whitened", similarity="cosine", content_prior=True)
    save_checkpoint(tmp_path / "other", other, make_processor(("text",)))
    pack = ["pack", str(workplace / "index"), "--output_dir", str(tmp_path / "small"), "--form"]
    with pytest.raises(DataError, match=r"were made by another model than .*other"):
        index_command([*pack, "int8", "--checkpoint", str(tmp_path / "other")])
    with pytest.raises(DataError, match="--form prefix needs --size"):
        index_command([*pack, "prefix", "--checkpoint", str(workplace / "model")])
    assert not (tmp_path / "small").exists()


def test_a_damaged_or_missing_file_is_refused(workplace, tmp_path):
    index = ItemIndex.from_pretrained(workplace / "index")
    with pytest.raises(DataError, match="transrec index pack"):
        unpack_index(tmp_path)
    pack_index(index, tmp_path, WIDTH, "int8")
    tensors = load_file(tmp_path / PACKED_NAME)
    for damage in ({"packed_format": "9"}, {"packed_format": "1"}):
        save_file(tensors, tmp_path / PACKED_NAME, damage)
        with pytest.raises(DataError, match="damaged"):
            unpack_index(tmp_path)
    with pytest.raises(DataError, match="--output_dir"):
        index_command(["pack", str(workplace / "index"), "--checkpoint", str(workplace / "model")])
    with pytest.raises(DataError, match="already holds an index"):
        index_command(["unpack", str(tmp_path), "--output_dir", str(workplace / "index")])
