"""Item vectors as codes: what is decoded is near, files are checked, semantic ids come back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from transrec_hf.errors import DataError
from transrec_hf.items import codes
from transrec_hf.items.codes import QUANTIZER_NAME, ItemQuantizer, _learn, hash_of_vectors, k_means, nearest
from transrec_hf.items.semantic_ids import codes_of, load_semantic_ids, resolve_collisions, save_semantic_ids


METHODS = ("residual", "product", "learned")


def clusters(n=400, size=16, kinds=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, size, generator=generator)
    return centres[torch.arange(n) % kinds] + 0.1 * torch.randn(n, size, generator=generator) + 3


@pytest.mark.parametrize("method", METHODS)
def test_more_codes_are_nearer(method):
    vectors = clusters()
    errors = [ItemQuantizer.fit(vectors, num, 16, method).report(vectors)["relative_error"] for num in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 < 1


def test_decoded_vectors_are_sums_of_centroids_or_rotated_parts():
    vectors = clusters()
    residual = ItemQuantizer.fit(vectors, 3, 8)
    codes = residual.encode(vectors)
    expected = residual.mean + sum(residual.codebooks[i][codes[:, i]] for i in range(3))
    torch.testing.assert_close(residual.decode(codes), expected)
    product = ItemQuantizer.fit(vectors, 4, 8, "product")
    identity = product.rotation @ product.rotation.T
    torch.testing.assert_close(identity, torch.eye(16), atol=1e-4, rtol=0)
    codes = product.encode(vectors)
    parts = torch.cat([product.codebooks[i][codes[:, i]] for i in range(4)], dim=1)
    torch.testing.assert_close(
        (product.decode(codes) - product.mean) @ product.rotation.T, parts, atol=1e-4, rtol=1e-4
    )


def test_a_rotation_shares_out_what_is_in_one_part():
    """All that differs is in the first four numbers, for which the first codebook alone has to answer."""
    vectors = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0] * 4 + [0.1] * 12)
    plain, rotated = (
        ItemQuantizer.fit(vectors, 4, 16, "product", rotations=rotations).report(vectors)["relative_error"]
        for rotations in (0, 10)
    )
    assert rotated < 0.8 * plain


def test_without_a_rotation_there_is_none():
    quantizer = ItemQuantizer.fit(clusters(), 4, 8, "product", rotations=0)
    assert quantizer.rotation is None
    found = quantizer.encode(clusters())
    parts = quantizer.decode(found) - quantizer.mean
    torch.testing.assert_close(parts[:, :4], quantizer.codebooks[0][found[:, 0]])


def test_what_is_learned_stays_as_near_as_where_it_began():
    """Three directions hold all that differs, and a linear map lets few codes answer for them."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3000, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    residual, learned = (
        ItemQuantizer.fit(vectors, 2, 16, method, iterations=20) for method in ("residual", "learned")
    )
    assert learned.report(vectors)["relative_error"] <= 1.1 * residual.report(vectors)["relative_error"]
    assert learned.report(vectors)["unused_codes"] < 0.1
    assert not torch.equal(learned.rotation, torch.eye(16)) and not torch.equal(learned.back, torch.eye(16))


def test_learned_codes_that_nobody_uses_start_again():
    vectors = clusters(2000)
    codebooks = torch.zeros(1, 8, 16)
    codebooks[0, 1:] = 1000 + torch.arange(7)[:, None]  # where no vector is
    found, _, _ = _learn(vectors - vectors.mean(dim=0), codebooks, 60, torch.Generator().manual_seed(0))
    assert (found.abs().amax(dim=(0, 2)) < 100).all()
    assert len(nearest(vectors - vectors.mean(dim=0), found[0]).unique()) >= 7


def test_many_vectors_are_fitted_on_a_sample(monkeypatch):
    monkeypatch.setattr(codes, "FITTED", 50)
    vectors = clusters(400)
    vectors[200:] += 100
    monkeypatch.setattr(codes, "k_means", lambda sample, *args: sample[:8] if len(sample) == 50 else None)
    quantizer = ItemQuantizer.fit(vectors, 1, 8)
    assert quantizer.vectors_hash == hash_of_vectors(vectors)
    assert 20 < float(quantizer.mean.mean()) < 85  # of both halves


def test_the_nearest_is_that_of_all_distances():
    vectors, centroids = torch.randn(50, 5), torch.randn(7, 5)
    assert torch.equal(nearest(vectors, centroids), torch.cdist(vectors, centroids).argmin(dim=1))


def test_no_centroid_stays_unused():
    """Of 3 different vectors, 297 times one of them: a draw of centroids almost surely misses the others."""
    vectors = torch.cat([torch.zeros(297, 2), torch.tensor([[5.0, 0], [0, 5.0], [5.0, 5.0]])])
    centroids = k_means(vectors, 4, 20, torch.Generator().manual_seed(0))
    assert torch.cdist(vectors, centroids).min(dim=1).values.max() < 1e-4


def test_it_is_the_same_again_and_from_its_file(tmp_path):
    vectors = clusters()
    for method in METHODS:
        first, second = (ItemQuantizer.fit(vectors, 4, 8, method, seed=3) for _ in range(2))
        first.save(tmp_path / method)
        loaded = ItemQuantizer.from_pretrained(tmp_path / method)
        for other in (second, loaded):
            assert torch.equal(other.codebooks, first.codebooks) and other.vectors_hash == first.vectors_hash
            assert torch.equal(other.encode(vectors), first.encode(vectors))


def test_the_report_counts():
    codebooks = torch.tensor([[[0.0], [10.0], [99.0], [77.0]]])
    quantizer = ItemQuantizer(codebooks, "residual", torch.zeros(1))
    report = quantizer.report(torch.tensor([[0.0], [1.0], [10.0], [10.0]]))
    assert report["unused_codes"] == 0.5 and report["collision_rate"] == 1.0
    assert report["usage_entropy"] == pytest.approx(0.5)  # one bit of two
    assert report["bytes_per_item"] == 0.25
    assert report["relative_error"] == pytest.approx(1 / 90.75)


def test_collisions_are_told_apart_by_one_more_code():
    codes = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 3], [1, 2]])
    assert resolve_collisions(codes).tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 3, 0], [1, 2, 2]]


def test_semantic_ids_come_back(tmp_path):
    codes = torch.tensor([[17, 3], [0, 255]])
    save_semantic_ids(tmp_path / "ids.json", np.array(["x", "7"]), codes)
    assert json.loads((tmp_path / "ids.json").read_text()) == {"x": ["<a_17>", "<b_3>"], "7": ["<a_0>", "<b_255>"]}
    ids, loaded = load_semantic_ids(tmp_path / "ids.json")
    assert ids.tolist() == ["x", "7"] and torch.equal(loaded, codes)
    (tmp_path / "ids.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "ids.json").read_bytes())
    assert codes_of(["7", "x", "7"], tmp_path / "ids.json").tolist() == [[0, 255], [17, 3], [0, 255]]
    with pytest.raises(DataError, match="has no codes of 1 of 2 items, such as 'y'; its first item is 'x'"):
        codes_of(["x", "y"], tmp_path / "ids.json")
    many = torch.arange(54).view(2, 27)  # more than there are letters
    save_semantic_ids(tmp_path / "many.json", ["x", "y"], many)
    assert json.loads((tmp_path / "many.json").read_text())["y"] == many[1].tolist()
    assert torch.equal(load_semantic_ids(tmp_path / "many.json")[1], many)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds no"),
        ('{"x": ["<a_1>"], "y": []}', "'y' has no codes"),
        ('{"x": ["<a_1>", "<c_1>"]}', "'x' has no codes"),
        ('{"x": ["<a_1>"], "y": ["<a_1>", "<b_1>"]}', "'y' has 2 codes, the first one 1"),
        ('{"x": ["<a_99999999999999999999>"]}', "'x' has no codes"),
        ('{"x": [1.5]}', "'x' has no codes"),
        ('{"x": [true]}', "'x' has no codes"),
        ('{"x": [-1]}', "'x' has no codes"),
        ('{"x": [NaN]}', "'x' has no codes"),
        ('{"x": ["<a_٣>"]}', "'x' has no codes"),
        ('{"x": [1], "x": [2]}', "'x' is there twice"),
    ],
)
def test_a_damaged_file_names_the_item(content, message, tmp_path):
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_semantic_ids(tmp_path / "ids.json")


def test_wrong_vectors_and_codes_are_refused(tmp_path):
    vectors = clusters()
    quantizer = ItemQuantizer.fit(vectors, 2, 8)
    with pytest.raises(DataError, match="fitted on vectors of 16 numbers, but these have 8"):
        quantizer.encode(vectors[:, :8])
    with pytest.raises(DataError, match="row 3 is not finite"):
        quantizer.encode(torch.cat([vectors[:2], torch.full((1, 16), torch.nan)]))
    with pytest.raises(DataError, match=r"\[0, 8\] of row 2 is out of range, from 0 to 7"):
        quantizer.decode(torch.tensor([[0, 0], [0, 8]]))
    with pytest.raises(DataError, match="has 2 per item"):
        quantizer.decode(torch.zeros(3, 5, dtype=torch.long))
    for wrong in (
        torch.zeros(3, 2),
        torch.full((3, 2), torch.nan),
        [["a", "b"]],
        [[0, 1], [2]],
        torch.zeros(3).long(),
    ):
        with pytest.raises(DataError, match="codes must be whole numbers of the shape"):
            quantizer.decode(wrong)
    with pytest.raises(DataError, match=r"\[0, -1\] of row 2 is out of range"):
        quantizer.decode([[0, 0], [0, -1]])
    with pytest.raises(DataError, match="item vectors must be a tensor or an array of numbers"):
        quantizer.encode([["a"] * 16])
    with pytest.raises(DataError, match="row 1 is not finite, or too large"):
        ItemQuantizer.fit(vectors * 1e30, 2, 8)
    for sizes in ((0, 8), (2, 1), (2, 70_000), (2.5, 8)):
        with pytest.raises(ValueError, match="num_codebooks must be 1 or more and codebook_size from 2"):
            ItemQuantizer.fit(vectors, *sizes)
    for options in ({"iterations": 0}, {"rotations": -1}):
        with pytest.raises(ValueError, match="iterations must be 1 or more and rotations 0 or more"):
            ItemQuantizer.fit(vectors, 2, 8, "product", **options)
    with pytest.raises(DataError, match="smaller codebook_size"):
        ItemQuantizer.fit(vectors[:7], 2, 8)
    with pytest.raises(DataError, match=r"3 equal parts: set num_codebooks to [24] or [24]"):
        ItemQuantizer.fit(vectors, 3, 8, "product")
    with pytest.raises(DataError, match="Fit one"):
        ItemQuantizer.from_pretrained(tmp_path)
    whole = torch.zeros(2, 2, dtype=torch.long)
    for ids in (["x"], ["x", "x"]):
        with pytest.raises(DataError, match="one id for each item"):
            save_semantic_ids(tmp_path / "ids.json", ids, whole)
    for wrong in (whole.float(), whole - 1):
        with pytest.raises(DataError, match="codes"):
            save_semantic_ids(tmp_path / "ids.json", ["x", "y"], wrong)
    assert not list(tmp_path.iterdir())


def test_vectors_and_codes_may_be_arrays_of_any_type():
    vectors = clusters()
    quantizer = ItemQuantizer.fit(vectors.double().numpy(), 2, 8)
    codes = quantizer.encode(vectors)
    assert torch.equal(codes, quantizer.encode(vectors.numpy()))
    for same in (codes.numpy(), codes.to(torch.uint8), codes.tolist()):  # uint8 is no mask
        torch.testing.assert_close(quantizer.decode(same), quantizer.decode(codes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, made: tensors.pop("mean"),
        lambda tensors, made: made.pop("method"),
        lambda tensors, made: made.update(method="magic"),
        lambda tensors, made: made.update(format="9"),
        lambda tensors, made: tensors["codebooks"].fill_(torch.inf),
        lambda tensors, made: tensors.update(mean=torch.zeros(3)),
    ],
)
def test_a_damaged_quantizer_is_refused(damage, tmp_path):
    tensors = {"codebooks": torch.zeros(2, 4, 16), "mean": torch.zeros(16)}
    made = {"method": "residual", "format": "1"}
    damage(tensors, made)
    save_file(tensors, tmp_path / QUANTIZER_NAME, made)
    with pytest.raises(DataError, match="quantizer"):
        ItemQuantizer.from_pretrained(tmp_path)
