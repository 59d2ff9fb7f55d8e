"""Vectors that items come with, from the column of a catalogue to recommendations, cards and the Hub."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from testing_utils import (
    TEXT_TOWERS,
    USER_ENCODER,
    VISION_TOWERS,
    make_catalogue,
    make_image_processor,
    make_split,
    make_tokenizer,
    make_trainer,
    train_and_serve,
    weights_of,
)

from transrec_hf import (
    Catalogue,
    DataError,
    ItemSource,
    RankingEvaluator,
    TransRecConfig,
    TransRecModel,
    TransRecProcessor,
    encode_catalogue,
    load_catalogue,
)
from transrec_hf.data.statistics import data_statistics
from transrec_hf.items.store import ActivationStore
from transrec_hf.publishing.checkpoint import check_fits
from transrec_hf.publishing.dataset import write_items


SIZE = 5


def mixed_catalogue(num_items: int = 12) -> Catalogue:
    """Items with text, an image, a vector, and all of them, in turn."""
    base = make_catalogue(num_items, kinds=("text image",)).items
    vectors = np.random.default_rng(1).normal(size=(num_items, SIZE))
    shown = [vector.tolist() if row % 4 >= 2 else None for row, vector in enumerate(vectors)]
    features = datasets.Features(
        {
            "item_id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "image": datasets.Image(decode=False),
            "features": datasets.List(datasets.Value("float32")),
        }
    )
    texts = [text if row % 4 in (0, 3) else None for row, text in enumerate(base["text"])]
    images = [image if row % 4 in (1, 3) else None for row, image in enumerate(base["image"])]
    columns = {"item_id": base["item_id"], "text": texts, "image": images}
    return Catalogue(datasets.Dataset.from_dict({**columns, "features": shown}, features=features))


def make_processor() -> TransRecProcessor:
    return TransRecProcessor(make_tokenizer(), make_image_processor(), max_text_length=16, features_size=SIZE)


def make_model(**fields) -> TransRecModel:
    torch.manual_seed(0)
    towers = {"text_config": TEXT_TOWERS["bert"](), "vision_config": VISION_TOWERS["vit"]()}
    config = TransRecConfig(**{**USER_ENCODER, **towers, "features_size": SIZE, **fields})
    return TransRecModel(config).eval()


@pytest.fixture(scope="module")
def source() -> ItemSource:
    return ItemSource(mixed_catalogue(), make_processor())


def test_a_sequence_mixes_vectors_with_text_and_images(source):
    model = make_model()
    batch = source.batch(np.arange(4))
    assert batch.present[:, :3].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [True, True, True],
    ]
    vectors = model.get_item_features(batch)
    states = model.get_user_features(vectors, torch.tensor([[0, 1, 2, 3]]), batch.present)
    assert states.isfinite().all()
    alone = model.item_encoder.features_projection(batch.parts["features"].values[0])
    both_missing = model.item_encoder.missing_embeds[:2].sum(dim=0)
    torch.testing.assert_close(vectors[2], alone[0] + both_missing)
    assert model.user_encoder.modality_embedding.num_embeddings == 7


def test_the_flat_output_of_the_processor_gives_the_same_vectors(source):
    model, catalogue = make_model(), source.catalogue
    contents = [catalogue.read(row) for row in range(4)]
    flat = source.processor(
        text=[content.get("text") for content in contents],
        images=[content.get("image") for content in contents],
        features=[content.get("features") for content in contents],
    )
    torch.testing.assert_close(model.get_item_features(**flat), model.get_item_features(source.batch(np.arange(4))))


@pytest.mark.parametrize("design", [{}, {"item_map": "whitened", "similarity": "cosine", "content_prior": True}])
def test_it_trains_is_saved_reported_and_served(tmp_path, source, design):
    model = make_model(**design)
    before = weights_of(model.item_encoder.features_projection)
    loaded, served = train_and_serve(tmp_path, model, source, trainable_blocks=0)
    after = loaded.item_encoder.features_projection.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert TransRecProcessor.from_pretrained(tmp_path / "run").features_size == SIZE
    assert len(served.recommend(["item-2", "item-0"], k=3)) == 3


def test_vectors_alone_are_a_model(tmp_path, source):
    """The frozen features of the literature: no tower at all."""
    catalogue = source.catalogue.select(source.catalogue.has("features"))
    processor = TransRecProcessor(features_size=SIZE)
    model = TransRecModel(TransRecConfig(**{**USER_ENCODER, "features_size": SIZE}))
    processor.save_pretrained(tmp_path)
    assert TransRecProcessor.from_pretrained(tmp_path).modalities == ["features"]
    vectors = encode_catalogue(model, ItemSource(catalogue, processor))
    assert vectors.shape == (len(catalogue), 16)


def test_a_store_leaves_vectors_as_they_are(tmp_path, source):
    model = make_model()
    model.freeze_towers(0)
    store = ActivationStore(tmp_path, model, source)
    store.fill()
    assert set(store.states) == {"text", "image"}
    torch.testing.assert_close(encode_catalogue(model, store.source), encode_catalogue(model, source))


def test_they_are_published_and_read_again(tmp_path, source):
    write_items(source.catalogue, tmp_path / "items.parquet")
    again = load_catalogue(tmp_path / "items.parquet")
    assert again.content_hash() == source.catalogue.content_hash()
    shares = data_statistics(source.catalogue, make_split())["items_with"]
    assert shares["features_only"] == pytest.approx(0.25) and sum(shares.values()) == pytest.approx(1)


def test_vectors_of_another_size_or_none_are_refused(source):
    with pytest.raises(DataError, match=r"features.*5"):
        check_fits(make_model(features_size=4), source.catalogue)
    model = TransRecModel(TransRecConfig(**{**USER_ENCODER, "features_size": SIZE}))
    with pytest.raises(DataError, match="6 of 12 items have no features"):
        encode_catalogue(model, ItemSource(source.catalogue, TransRecProcessor(features_size=SIZE)))
    with pytest.raises(ValueError, match=r"not \(5,\)"):
        source.processor(features=[np.ones(3)])


def test_training_refuses_vectors_of_another_size(source, tmp_path):
    with pytest.raises(
        DataError, match=r"features have 5 numbers, but this model reads vectors of 4\. Use the encoder"
    ):
        make_trainer(
            tmp_path / "run",
            model=make_model(features_size=4),
            catalogue=source.catalogue,
            processor=source.processor,
        )


def test_slices_name_the_combinations(source):
    report = RankingEvaluator(source, make_split().test).evaluate(make_model())
    assert set(report["slices"]["target_modality"]) <= {"text", "image", "features", "text+image+features"}
