"""Requests to a recommender: strangers, filters, steps after ranking, explanations, threads, live items, bad input."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.compute as pc
import pytest
import torch
from testing_utils import make_catalogue, make_config, make_model, make_processor

from transrec_hf import DataError, ItemSource, Recommender
from transrec_hf.data.catalogue import Catalogue
from transrec_hf.errors import UnknownItems
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.serving.rerank import cap_per_attribute, dampen_popularity, maximal_marginal_relevance


HISTORY = ["item-3", "item-1", "item-8"]
NEW = [
    {"item_id": "new-1", "text": "blue sock", "price": 3, "brand": "a"},
    {"item_id": "new-2", "text": "old shoe", "price": 99, "brand": "b"},
]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dot": {},
    "cosine": {"similarity": "cosine", "popularity_prior": True, "content_prior": True},
    "whitened": {"similarity": "cosine", "popularity_prior": True, "item_map": "whitened"},
    "text": {"modalities": ("text",), "popularity_prior": True},
}


def priced_catalogue(num_items: int = 12, **kwargs: Any) -> Catalogue:
    items = make_catalogue(num_items, **kwargs).items
    items = items.add_column("price", list(range(num_items)))
    return Catalogue(items.add_column("brand", [("a", "b", "c")[row % 3] for row in range(num_items)]))


def statistics_of(catalogue: Catalogue) -> ItemStatistics:
    return ItemStatistics(catalogue.item_ids, np.arange(len(catalogue)) ** 2 + 1)


def make_recommender(kind: str = "dot", num_items: int = 12, **kwargs: Any) -> Recommender:
    model = make_model(**CONFIGURATIONS[kind])
    kinds = ("text",) if kind == "text" else ("text", "image", "text image")
    catalogue = priced_catalogue(num_items, kinds=kinds)
    source = ItemSource(catalogue, make_processor(model.config.modalities))
    return Recommender(model, source, statistics=statistics_of(catalogue), **kwargs)


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return make_recommender()


def ids(found: Any) -> list[str]:
    return [item.item_id for item in found]


# Who asks


def test_one_history_or_several(recommender: Recommender) -> None:
    together = recommender.recommend([HISTORY, ("item-0",), np.array(["item-5"])], 4)
    for history, found in zip([HISTORY, ["item-0"], ["item-5"]], together, strict=True):
        assert ids(recommender.recommend(history, 4)) == ids(found)
    assert recommender.recommend(np.array(HISTORY), 3) == recommender.recommend(HISTORY, 3)
    assert recommender.recommend(iter(HISTORY), 3) == recommender.recommend(HISTORY, 3)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_stranger_counts_as_the_item_that_it_shows(kind: str) -> None:
    """A raw item with the contents of an item of the catalogue makes the same history."""
    served = make_recommender(kind)
    catalogue = priced_catalogue(kinds=("text",) if kind == "text" else ("text", "image", "text image"))
    for row in (0, 1, 2):
        raw = catalogue.read(row, served.model.config.modalities)
        for history in ([raw], ["item-7", raw], [raw, "item-7", raw]):
            known = [f"item-{row}" if item is raw else item for item in history]
            found, expected = (served.recommend(h, 12, exclude_seen=False) for h in (history, known))
            assert ids(found) == ids(expected)
            assert [item.score for item in found] == pytest.approx([item.score for item in expected], abs=1e-3)


def test_raw_items_come_in_several_forms(recommender: Recommender) -> None:
    image = PIL.Image.new("RGB", (40, 30), "red")
    alone, told = (recommender.recommend([item], 3) for item in (image, {"image": image}))
    assert alone == told
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    assert ids(recommender.recommend([{"image": file.getvalue()}], 3)) == ids(told)
    mixed = recommender.recommend([{"text": "red hat", "image": image}, "item-2", {"text": "sock"}], 12)
    assert len(mixed) == 11, "what is raw is not left out of the catalogue"


def test_vectors_are_strangers_too() -> None:
    model = make_model(make_config((), features_size=4))
    items = (
        make_catalogue()
        .items.select_columns("item_id")
        .add_column("features", [[1.0, 2, 3, row] for row in range(12)])
    )
    from transrec_hf import TransRecProcessor

    served = Recommender(model, ItemSource(Catalogue(items), TransRecProcessor(features_size=4)))
    expected = ids(served.recommend(["item-5"], 12, exclude_seen=False))
    for raw in (np.array([1.0, 2, 3, 5]), torch.tensor([1.0, 2, 3, 5]), {"features": [1, 2, 3, 5]}):
        assert ids(served.recommend([raw], 12, exclude_seen=False)) == expected
    for number in (float("nan"), 1e39):
        with pytest.raises(DataError, match="finite numbers"):
            served.recommend([{"features": [1, 2, 3, number]}])
    for number in (1e20, 3e38):  # no other item could be recommended beside it
        with pytest.raises(DataError, match=r"'huge'.*too long for finite scores"):
            served.add_items([{"item_id": "huge", "features": [number, 2, 3, 4]}])
    assert ids(served.recommend(["item-5"], 12, exclude_seen=False)) == expected
    with pytest.raises(DataError, match="shape"):
        served.recommend([{"features": [1, 2, 3]}])


def test_ids_may_be_numbers_everywhere() -> None:
    items = make_catalogue().items.remove_columns("item_id").add_column("item_id", list(range(12)))
    source = ItemSource(Catalogue(items), make_processor())
    with_catalogue = Recommender(make_model(), source)
    from_index = Recommender(make_model(), index=with_catalogue.index, processor=make_processor())
    for served in (with_catalogue, from_index):
        first = served.recommend(["3", "4"], 3)
        assert first == served.recommend([3, 4], 3) == served.recommend([np.int64(3), 4], 3)
        assert all(isinstance(item.item_id, str) for item in first)


def test_an_empty_history_gets_the_popular_items_and_is_told_so(recommender: Recommender) -> None:
    found = recommender.recommend([[], HISTORY, []], 3)
    assert ids(found[0]) == ids(recommender.popular(3)) == ["item-11", "item-10", "item-9"]
    assert [user.fallback for user in found] == ["popular", None, "popular"]
    assert found[0][0].score == 11**2 + 1
    assert ids(recommender.recommend([], 2, filter="price < 5")) == ["item-4", "item-3"]


def test_unknown_items_are_named_or_skipped(recommender: Recommender) -> None:
    with pytest.raises(UnknownItems, match=r"2 unknown item ids: \['x', 'y'\]") as error:
        recommender.recommend([["item-1", "x"], ["y", "x"]])
    assert error.value.item_ids == ["x", "y"] and "/" not in str(error.value)
    found = recommender.recommend([["item-1", "x"], ["y", "x"]], 3, on_unknown="skip")
    assert ids(found[0]) == ids(recommender.recommend(["item-1"], 3))
    assert [user.skipped for user in found] == [["x"], ["y", "x"]]
    assert found[1].fallback == "popular"
    chosen = recommender.recommend(
        ["item-1"], 3, filter=["x", "item-7"], candidates={"item-7", "y"}, on_unknown="skip"
    )
    assert ids(chosen) == ["item-7"]


# What is recommended


def test_filters_masks_ids_candidates_and_modalities(recommender: Recommender) -> None:
    everything = ids(recommender.recommend(HISTORY, 12))
    cheap = [item for item in everything if int(item[5:]) < 6]
    mask = [row < 6 for row in range(12)]
    for chosen in ("price < 6", mask, np.array(mask), torch.tensor(mask), [f"item-{row}" for row in range(6)]):
        assert ids(recommender.recommend(HISTORY, 12, filter=chosen)) == cheap
    assert ids(recommender.recommend(HISTORY, 12, candidates=["item-0", "item-9", "item-3"])) == [
        item for item in everything if item in ("item-0", "item-9")
    ]
    found = recommender.recommend([HISTORY, ["item-0"]], 12, candidates=[["item-0"], ["item-9", "item-2"]])
    assert [sorted(ids(user)) for user in found] == [["item-0"], ["item-2", "item-9"]]
    assert ids(recommender.recommend(HISTORY, candidates=[["item-0"]])) == ["item-0"]
    rest = ids(recommender.recommend(HISTORY, 12, filter=f"price < 6 and item_id not in {cheap[:2]}"))
    assert rest == cheap[2:]
    assert recommender.recommend(HISTORY, filter="price > 100") == []
    assert recommender.recommend(HISTORY, filter="price < 6", candidates=["item-9"]) == []
    with_image = ids(recommender.recommend(HISTORY, 12, modality="image"))
    assert with_image == [item for item in everything if int(item[5:]) % 3 > 0]


def test_k_may_be_enormous(recommender: Recommender) -> None:
    assert len(recommender.recommend(HISTORY, 10**9)) == 9
    assert len(recommender.similar_items("item-1", 10**9)) == 11
    assert len(recommender.popular(10**9)) == 12


def test_similar_items_by_the_cosine(recommender: Recommender) -> None:
    vectors = torch.nn.functional.normalize(recommender.item_embeds, dim=1)
    cosines = vectors @ vectors[4]
    cosines[4] = -2
    found = recommender.similar_items("item-4", 5)
    assert ids(found) == [f"item-{row}" for row in cosines.argsort(descending=True)[:5].tolist()]
    assert [item.score for item in found] == pytest.approx(cosines.sort(descending=True).values[:5].tolist(), abs=1e-5)
    raw = {"text": recommender.catalogue.text(3)}  # type: ignore[union-attr]
    assert ids(recommender.similar_items(raw, 1)) == ["item-3"]
    assert ids(recommender.similar_items("item-4", 12, filter="price > 9")) == [
        item for item in ids(recommender.similar_items("item-4", 12)) if item in ("item-10", "item-11")
    ]


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_scores_are_those_of_recommendations(kind: str) -> None:
    served = make_recommender(kind)
    found = served.recommend([HISTORY, ["item-0"]], 12, exclude_seen=False)
    for user, history in enumerate([HISTORY, ["item-0"]]):
        scores = served.score(history, ids(found[user]))
        assert scores == pytest.approx([item.score for item in found[user]], abs=1e-4)
    assert served.score([HISTORY, ["item-0"]], ["item-5", {"text": "red hat"}]).shape == (2, 2)


def test_answers_become_tables(recommender: Recommender) -> None:
    found = recommender.recommend([HISTORY, ["item-0"]], 2)
    table = found.to_arrow(["anna", "ben"])
    assert table.column_names == ["user_id", "item_id", "rank", "score"]
    assert table["user_id"].to_pylist() == ["anna", "anna", "ben", "ben"] and table["rank"].to_pylist() == [1, 2, 1, 2]
    assert found[0].to_pandas()["price"].tolist() == [int(item.item_id[5:]) for item in found[0]]
    assert found.to_dataset()["item_id"] == table["item_id"].to_pylist()
    nothing = recommender.recommend(HISTORY, filter="price > 100").to_pandas()
    assert nothing.columns.tolist() == table.column_names and nothing.empty
    found[1][0].columns["rank"] = "of another kind"
    assert found[1].to_arrow()["rank"].to_pylist() == [1, 2]
    assert found.versions == found[1].versions == recommender.versions
    assert found[0][0].columns["brand"] in "abc" and "text" not in found[0][0].columns


# Steps after ranking


def test_diversity_by_hand(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORY, 9)
    scores = {item.item_id: item.score for item in found}
    vectors = dict(
        zip(recommender.item_ids, torch.nn.functional.normalize(recommender.item_embeds, dim=1), strict=True)
    )
    low, spread = min(scores.values()), max(scores.values()) - min(scores.values())
    chosen: list[str] = []
    while len(chosen) < 9:
        chosen.append(
            max(
                (item for item in scores if item not in chosen),
                key=lambda item: (
                    0.4 * (scores[item] - low) / spread
                    - 0.6 * max([float(vectors[item] @ vectors[other]) for other in chosen], default=0)
                ),
            )
        )
    diverse = recommender.recommend(HISTORY, 9, rerank=maximal_marginal_relevance(0.6))
    assert ids(diverse) == chosen != ids(found)
    assert ids(recommender.recommend(HISTORY, 9, rerank=maximal_marginal_relevance(0))) == ids(found)
    assert {item.item_id: item.score for item in diverse} == scores, "a score stays what the model gave"


def test_a_cap_and_dampened_popularity(recommender: Recommender) -> None:
    everything = recommender.recommend(HISTORY, 12)
    capped = recommender.recommend(HISTORY, 3, rerank=cap_per_attribute("brand", 1))
    firsts = [next(item.item_id for item in everything if item.columns["brand"] == brand) for brand in "abc"]
    assert sorted(ids(capped)) == sorted(firsts) and ids(capped) == [i for i in ids(everything) if i in firsts]
    dampened = ids(recommender.recommend(HISTORY, 12, rerank=dampen_popularity(1000)))
    assert dampened == sorted(dampened, key=lambda item: int(item[5:]))
    both = recommender.recommend(HISTORY, 2, rerank=[dampen_popularity(1000), cap_per_attribute("brand", 1)])
    assert ids(both) == ["item-0", "item-2"]


# Why


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_explanations_by_hand(kind: str) -> None:
    served = make_recommender(kind)
    history = ["item-2", {"text": "red hat"}, "item-5"]
    found = served.recommend(history, 3, explain=True)
    assert ids(found) == ids(served.recommend(history, 3))
    for item in found:
        assert item.explanation is not None
        for place in range(3):
            without = served.score([*history[:place], *history[place + 1 :]], [item.item_id])[0]
            assert item.explanation.history[place] == pytest.approx(item.score - without, abs=1e-3)
    alone = served.recommend(["item-2"], 1, explain=True)[0]
    assert alone.explanation is not None and alone.explanation.history == {0: pytest.approx(alone.score)}


def test_what_a_modality_adds_by_hand(recommender: Recommender) -> None:
    catalogue = recommender.catalogue
    assert catalogue is not None
    item = recommender.recommend(["item-2", "item-1"], 12, explain=True, filter=["item-5", "item-3"])
    for found in item:
        row = int(found.item_id[5:])
        for name, other in (("text", "image"), ("image", "text")):
            shown = [catalogue.read(2, [other]), catalogue.read(1)]
            target = catalogue.read(row, [other]) or catalogue.read(row)
            without = recommender.score(shown, [target])[0]
            assert found.explanation.modalities[name] == pytest.approx(found.score - without, abs=1e-3)


def test_an_index_alone_explains_by_the_history_alone(recommender: Recommender) -> None:
    served = Recommender(make_model(), index=recommender.index, processor=make_processor())
    found = served.recommend(HISTORY, 2, explain=True)
    assert found[0].explanation is not None and found[0].explanation.modalities is None
    assert set(found[0].explanation.history) == {0, 1, 2}


def test_only_what_is_read_of_a_long_history_is_explained(recommender: Recommender) -> None:
    history = [f"item-{row}" for row in range(10)]
    found = recommender.recommend(history, 1, explain=True)
    assert list(found[0].explanation.history) == [4, 5, 6, 7, 8, 9]  # max_position_embeddings is 6


# Items that come and go


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_added_items_are_as_if_they_had_always_been_there(kind: str) -> None:
    kinds = ("text",) if kind == "text" else ("text", "image", "text image")
    served = make_recommender(kind, 12)
    more = priced_catalogue(14, kinds=kinds)
    if kind == "text":
        assert served.model.config.popularity_prior
    served.add_items(more.select(np.array([12, 13])))
    known = statistics_of(priced_catalogue(12, kinds=kinds))
    model = make_model(**CONFIGURATIONS[kind])
    if kind == "whitened":
        model = served.model
    whole = Recommender(model, ItemSource(more, make_processor(model.config.modalities)), statistics=known)
    torch.testing.assert_close(served.item_embeds, whole.item_embeds, atol=1e-4, rtol=1e-4)
    found, expected = (of.recommend(["item-13", "item-1"], 14) for of in (served, whole))
    assert ids(found) == ids(expected)
    assert [item.columns for item in found] == [item.columns for item in expected]


def test_items_are_added_updated_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = make_recommender()
    before = served.versions
    assert served.add_items(NEW) == ["new-1", "new-2"] and len(served) == 14
    assert served.versions.index != before.index and served.versions.model == before.model
    assert {"new-1", "new-2"} <= set(ids(served.recommend(HISTORY, 14)))
    assert ids(served.recommend(HISTORY, 3, filter="price > 50")) == ["new-2"]
    with pytest.raises(DataError, match=r"1 items exist already: .'new-1'"):
        served.add_items([{"item_id": "new-1", "text": "hat"}, {"item_id": "new-3", "text": "hat"}])
    with pytest.raises(UnknownItems, match="new-3"):
        served.update_items([{"item_id": "new-3", "text": "hat"}])
    score = served.score(HISTORY, ["new-1"])[0]
    served.update_items([{"item_id": "new-1", "text": "green new hat", "price": 3, "brand": "a"}])
    assert served.score(HISTORY, ["new-1"])[0] != score and len(served) == 14
    with monkeypatch.context() as patch:  # the same contents are not encoded again
        patch.setattr("transrec_hf.serving.building.encode_catalogue", None)
        served.update_items([{"item_id": "new-1", "text": "green new hat", "price": 60, "brand": "a"}])
        served.add_items([{"item_id": "new-2", "text": "old shoe", "price": 1, "brand": "b"}], exist_ok=True)
    assert ids(served.recommend(HISTORY, 3, filter="price > 50")) == ["new-1"]
    served.remove_items(["new-2", "item-5"])
    assert not {"new-2", "item-5"} & set(ids(served.recommend(HISTORY, 14)))
    with pytest.raises(UnknownItems, match="item-5"):
        served.recommend(["item-5"])
    with pytest.raises(UnknownItems, match="item-5"):
        served.remove_items(["item-5"])
    served.add_items([{"item_id": "item-5", "text": "red"}])
    assert "item-5" in ids(served.recommend(HISTORY, 14))


def test_readable_in_histories_and_not_recommended() -> None:
    served = make_recommender()
    expected = ids(served.recommend(["item-5"], 12))
    served.remove_items(["item-5"], readable=True)
    assert ids(served.recommend(["item-5"], 12)) == expected
    assert "item-5" not in ids(served.recommend(["item-1"], 12))
    assert "item-5" not in ids(served.recommend(["item-1"], 12, candidates=["item-5", "item-2"]))
    assert "item-5" not in ids(served.recommend([], 12)) and "item-5" not in ids(served.similar_items("item-1", 12))
    again = Recommender(served.model, index=served.index, processor=served.processor)
    assert ids(again.recommend(["item-5"], 12)) == expected and "item-5" not in ids(again.recommend(["item-1"], 12))
    served.update_items([{"item_id": "item-5", "text": "red red", "price": 5, "brand": "c"}])
    assert "item-5" in ids(served.recommend(["item-1"], 12))


def test_an_id_baseline_serves_but_takes_no_strangers() -> None:
    served = Recommender(make_model(modalities=(), num_items=12), ItemSource(make_catalogue()))
    assert len(served.recommend(HISTORY, 3)) == 3
    for act in (lambda: served.add_items(NEW), lambda: served.recommend([{"text": "hat"}])):
        with pytest.raises(DataError, match="by their ids only"):
            act()


def test_a_hybrid_takes_strangers_without_id_vectors() -> None:
    catalogue = priced_catalogue()
    model = make_model(num_items=12)
    served = Recommender(model, ItemSource(catalogue, make_processor()), statistics=statistics_of(catalogue))
    served.add_items([{"item_id": "new", "text": "red hat"}])
    with torch.no_grad():
        model.item_encoder.item_embedding.weight.zero_()
    plain = Recommender(model, ItemSource(catalogue, make_processor()))
    plain_new = plain._encode_raw([{"text": "red hat"}])[0]
    torch.testing.assert_close(served.item_embeds[-1:], plain_new)
    assert len(served.recommend(["new", {"text": "sock"}], 3)) == 3


# Several at a time


def test_eight_threads_get_what_one_gets() -> None:
    served = make_recommender("cosine")
    requests = [
        ([f"item-{row}", {"text": "red hat"} if row % 3 else f"item-{(row * 7) % 12}"], f"price != {row}")
        for row in range(12)
    ]

    def ask(request: tuple[list[Any], str]) -> list[str]:
        return ids(served.recommend(request[0], 5, filter=request[1], explain=request[1].endswith("0")))

    expected = [ask(request) for request in requests]
    start = threading.Barrier(8)

    def work(number: int) -> list[list[str]]:
        start.wait()
        return [ask(request) for request in requests[number:] + requests[:number]]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(work, range(8))):
            assert found == expected[number:] + expected[:number]


def test_threads_that_ask_while_others_change() -> None:
    """Every answer is of one moment: items come and go five at a time, and the others are always there."""
    served = make_recommender()
    even = [{"item_id": f"even-{row}", "text": "red hat"} for row in range(5)]
    odd = [{"item_id": f"odd-{row}", "text": "old shoe"} for row in range(5)]
    served.add_items(even)
    done, wrong = threading.Event(), []

    def ask() -> None:
        while not done.is_set():
            found = ids(served.recommend(["item-1", "item-2"], 100))
            kinds = {item.split("-")[0] for item in found} - {"item"}
            if len(found) not in (15, 20) or not kinds:
                wrong.append((len(found), kinds))
            time.sleep(0.005)

    askers = [threading.Thread(target=ask) for _ in range(7)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(3):
            served.add_items(odd)
            served.remove_items([row["item_id"] for row in even])
            served.add_items(even)
            served.remove_items([row["item_id"] for row in odd])
    finally:
        done.set()
        for asker in askers:
            asker.join()
    assert not wrong, wrong[:3]


def test_two_processes_of_one_answer(tmp_path: Path) -> None:
    """The same from an index in another object, bit for bit."""
    first = make_recommender("cosine", folder=tmp_path)
    second = Recommender(make_model(**CONFIGURATIONS["cosine"]), index=first.index, processor=make_processor())
    assert first.recommend(HISTORY, 12) == second.recommend(HISTORY, 12)


# Bad input

BAD: dict[str, tuple[Any, str]] = {
    "a text for a history": (lambda of: of.recommend("item-1"), "put it in brackets"),
    "a number for a history": (lambda of: of.recommend(3), "put it in brackets"),
    "items beside lists": (lambda of: of.recommend([["item-1"], "item-1"]), "not a mixture"),
    "none in a history": (lambda of: of.recommend([None]), "must be an id or a raw item"),
    "true in a history": (lambda of: of.recommend([True]), "must be an id or a raw item"),
    "k of 0": (lambda of: of.recommend(HISTORY, 0), "k must be a whole number"),
    "negative k": (lambda of: of.similar_items("item-1", -1), "k must be a whole number"),
    "k that is a text": (lambda of: of.popular("3"), "k must be a whole number"),
    "an unknown way": (lambda of: of.recommend(HISTORY, on_unknown="ignore"), "'raise' or 'skip'"),
    "a short mask": (lambda of: of.recommend(HISTORY, filter=[True]), "1 entries for 12 items"),
    "unknown ids to filter": (lambda of: of.recommend(HISTORY, filter=["zz"]), "unknown item ids"),
    "a filter of no column": (
        lambda of: of.recommend(HISTORY, filter="colour == 'red'"),
        "names the unknown column 'colour'",
    ),
    "unknown candidates": (lambda of: of.recommend(HISTORY, candidates=["zz"]), "unknown item ids"),
    "candidates of others": (lambda of: of.recommend(HISTORY, candidates=[[], []]), "2 lists of candidates for 1"),
    "a sound for a model of texts": (lambda of: of.recommend([{"audio": np.ones(9)}]), "has audio, but this model"),
    "an unknown modality": (lambda of: of.recommend(HISTORY, modality="sound"), "modality must be one of text, image"),
    "no content": (lambda of: of.recommend([{}]), "has nothing"),
    "an unknown content": (lambda of: of.recommend([{"title": "hat"}]), "cannot have 'title'"),
    "a blank text": (lambda of: of.recommend([{"text": "  "}]), "not blank"),
    "bytes that are no image": (lambda of: of.recommend([{"image": b"GIF89a"}]), "cannot be read"),
    "a path for an image": (lambda of: of.recommend([{"image": "/etc/passwd"}]), "give a PIL image"),
    "an image without end": (lambda of: of.recommend([PIL.Image.new("1", (9000, 9000))]), "bomb"),
    "vectors for a model of texts": (lambda of: of.recommend([np.ones(3)]), "has features, but this model reads"),
    "a set for a history": (lambda of: of.recommend({"item-1"}), "has no order"),
    "half a character": (lambda of: of.recommend([{"text": "hat \ud800"}]), "a broken character"),
    "an image without pixels": (lambda of: of.recommend([PIL.Image.new("RGB", (0, 5))]), "0 x 5 pixels"),
    "a number for a filter": (
        lambda of: of.recommend(HISTORY, filter=5),
        "a boolean for each item, or a list of ids, got 5",
    ),
    "one of Arrow": (
        lambda of: of.recommend(HISTORY, filter=pc.field("price") < 3),
        "must be an expression",
    ),
    "a function for a filter": (lambda of: of.popular(filter=len), "a boolean for each item, or a list of ids"),
    "a square mask": (lambda of: of.recommend(HISTORY, filter=np.ones((12, 12), bool)), "an item id must be a string"),
    "values of two kinds": (lambda of: of.recommend(HISTORY, filter="price in [1, 'a']"), "cannot be read.*'a'"),
    "text as candidates": (
        lambda of: of.recommend(HISTORY, candidates="item-1"),
        "candidates must be a list of ids",
    ),
    "unknown ids to remove": (lambda of: of.remove_items(["zz"]), r"Add them, or leave them out\.$"),
    "a name for a step": (lambda of: of.recommend(HISTORY, rerank="diversity"), "rerank must be a step"),
    "a number for a step": (lambda of: of.recommend(HISTORY, rerank=[3]), "rerank must be a step"),
    "a weight that is a text": (lambda of: maximal_marginal_relevance("much"), "between 0 and 1"),
    "a weight without end": (lambda of: dampen_popularity(float("inf")), "finite number"),
    "a time for all": (lambda of: of.recommend(HISTORY, timestamps=5), "one entry for each item"),
    "times of one for several": (lambda of: of.recommend([HISTORY] * 2, timestamps=[1, 2]), "one entry for each"),
    "times that are texts": (lambda of: of.recommend(HISTORY, timestamps=["a"] * 3), "a whole number"),
    "times that are enormous": (lambda of: of.recommend(HISTORY, timestamps=[10**30] * 3), "of 64 bits"),
    "a number beyond 64 bits": (
        lambda of: of.add_items([{**NEW[0], "price": 2**64}]),
        "'price' of the items cannot be",
    ),
    "a column of two kinds": (
        lambda of: of.add_items([NEW[0], {**NEW[1], "size": 3}, {"item_id": "x", "text": "a", "size": "S"}]),
        "'size' of the items cannot be kept",
    ),
    "no item to add": (lambda of: of.add_items([]), "there is nothing in it"),
    "no history to score by": (lambda of: of.score([], ["item-1"]), "no user vector"),
    "a text to score": (lambda of: of.score(HISTORY, "item-1"), "put it in brackets"),
    "a text to remove": (lambda of: of.remove_items("item-1"), "put it in brackets"),
    "a weight beyond 1": (lambda of: maximal_marginal_relevance(2), "between 0 and 1"),
    "a cap of no column": (lambda of: of.recommend(HISTORY, rerank=cap_per_attribute("size")), "no column 'size'"),
    "no cap": (lambda of: cap_per_attribute("brand", 0), "whole number"),
    "an item without contents": (lambda of: of.add_items([{"item_id": "new"}]), "column"),
    "an item twice": (lambda of: of.add_items([{"item_id": "n", "text": "a"}] * 2), "duplicate item_id"),
    "a price that is a text": (
        lambda of: of.add_items([{**NEW[0], "price": "dear"}]),
        "has the type string, but in the index it has int64",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(recommender: Recommender, what: str) -> None:
    act, said = BAD[what]
    before = recommender.versions
    with pytest.raises(DataError, match=said):
        act(recommender)
    assert recommender.versions == before


def test_timestamps_belong_to_items(recommender: Recommender) -> None:
    with pytest.raises(DataError, match="one entry for each item"):
        recommender.recommend(HISTORY, timestamps=[1, 2])
    served = Recommender(
        make_model(user_encoder="hstu", time_buckets=8), ItemSource(make_catalogue(), make_processor())
    )
    times = [10, 20, 90]
    with_unknown = served.recommend(
        ["item-3", "zz", "item-1", "item-8"], 3, on_unknown="skip", timestamps=[10, 15, 20, 90]
    )
    assert with_unknown == served.recommend(HISTORY, 3, timestamps=times)
    assert served.recommend(HISTORY, 3, timestamps=times, explain=True)[0].explanation is not None


def test_a_deleted_image_is_named(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    served = make_recommender()
    catalogue = [{"item_id": "gone", "image": str(tmp_path / "a.png")}, {"item_id": "b", "text": "hat"}]
    from transrec_hf import load_catalogue

    items = load_catalogue(catalogue)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"gone.*image file not found"):
        served.add_items(items)


def test_numbers_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,text,price,code,empty\na,red hat,3.5,007,\nb,old sock,20,12,\nc,shoe,,3,\n"
    )
    model, processor = make_model(modalities=("text",)), make_processor(("text",))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    served = Recommender.from_pretrained(tmp_path, tmp_path / "items.csv")
    assert ids(served.recommend(["c"], filter="price < 4 and code == '007'")) == ["a"]
    served.add_items([{"item_id": "d", "text": "new hat", "price": "2", "code": "12"}])
    assert sorted(ids(served.recommend(["c"], filter="price < 4 or code == '12'"))) == ["a", "b", "d"]
    with pytest.raises(DataError, match="'price' of the items has the type string, but in the index it has double"):
        served.add_items([{"item_id": "e", "text": "new hat", "price": "dear"}])
