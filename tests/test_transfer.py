"""What transfers: whitened item maps, content priors, ID vectors of a hybrid, starts, and the guard against harm."""

from __future__ import annotations

import itertools
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from testing_utils import (
    assert_same_weights,
    make_catalogue,
    make_collator,
    make_config,
    make_processor,
    make_sequences,
    make_split,
    make_trainer,
)

from transrec_hf import ItemSource, RankingEvaluator, Recommender, TransRecConfig, TransRecModel, encode_catalogue
from transrec_hf.evaluation.metrics import metric_values
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.items.meeting import fitted_decay, set_item_vectors, start_from_data
from transrec_hf.model.item_encoder_transrec import WhitenedProjection
from transrec_hf.training.transfer import (
    AUTO_INITS,
    INITS,
    best_evaluation,
    choose_start,
    has_trained_towers,
    learning_curve,
    start_from,
)


DESIGN = {
    "item_map": "whitened",
    "similarity": "cosine",
    "content_prior": True,
    "popularity_prior": True,
    "user_hidden_size": 8,
}
ITEMS = 12


def fresh(modalities: str = "text image", **fields) -> TransRecModel:
    torch.manual_seed(0)
    return TransRecModel(make_config(modalities, **{**DESIGN, **fields})).eval()


def source_of(num_items: int = ITEMS, modalities: str = "text image", kinds=("text image",)) -> ItemSource:
    return ItemSource(make_catalogue(num_items, kinds=kinds), make_processor(modalities))


def fitted(modalities: str = "text image", **fields) -> tuple[TransRecModel, ItemSource]:
    model, source = fresh(modalities, **fields), source_of(modalities=modalities)
    standardize_projections(model, source)
    return model, source


# Whitening


def test_items_that_are_all_alike_have_finite_vectors():
    projection = WhitenedProjection(make_config("text"), 16)
    states = torch.full((5, 16), 3.0)
    projection.fit(states)
    assert projection(states).isfinite().all()


@pytest.mark.parametrize("width", [8, 16, 40], ids=["narrower", "as wide", "wider"])
def test_whitened_states_have_no_mean_and_like_variances(width):
    torch.manual_seed(0)
    projection = WhitenedProjection(make_config("text"), width)
    states = torch.randn(500, width) @ torch.randn(width, width) + 3
    projection.fit(states, torch.Generator().manual_seed(0))
    white = projection.whiten(states)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(16), atol=1e-3, rtol=0)
    variances = torch.linalg.eigvalsh(white.T @ white / 500)
    assert variances.max() <= 1 + 1e-4 and (variances > 0.01).sum() == min(width, 16)


def test_another_catalogue_has_statistics_of_its_own_on_the_same_axes():
    torch.manual_seed(0)
    projection = WhitenedProjection(make_config("text"), 40)
    projection.fit(torch.randn(300, 40) @ torch.randn(40, 40))
    axes, before = projection.axes.clone(), projection.whitening.clone()
    states = torch.randn(300, 40) @ torch.randn(40, 40) - 5
    projection.fit(states)
    assert torch.equal(projection.axes, axes) and not torch.equal(projection.whitening, before)
    assert projection.whiten(states).mean(dim=0).abs().max() < 1e-3


def test_an_untrained_model_ranks_by_content():
    """States are recency-weighted means of the history's own vectors, whatever the user encoder's weights are."""
    model, source = fitted(popularity_prior=False)
    items = encode_catalogue(model, source)
    torch.testing.assert_close(items.norm(dim=1), torch.ones(ITEMS))
    history = torch.tensor([[3, 1, 5], [2, -1, -1]])
    states = model.get_user_features(items, history, source.present)
    decay = torch.sigmoid(model.content_prior.decay)
    mean = items[5] + decay * items[1] + decay**2 * items[3]
    expected = torch.nn.functional.normalize(mean, dim=0) * model.logit_scale.value.exp()
    torch.testing.assert_close(states[0, -1], expected)
    torch.testing.assert_close(states[1, 0], items[2] * model.logit_scale.value.exp())
    assert states[1, 1:].eq(0).all()
    for parameter in model.user_encoder.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(model.get_user_features(items, history, source.present), states)


def test_scores_are_cosines_and_a_multiple_of_log_popularity():
    model, source = fitted()
    source.log_popularity = torch.linspace(-5, -1, ITEMS)
    items = encode_catalogue(model, source)
    assert items.shape == (ITEMS, 17)
    states = model.get_user_features(items, torch.tensor([[4]]), source.present)[:, 0]
    cosines = items[:, :16] @ items[4, :16]
    expected = cosines * model.logit_scale.value.exp() + model.popularity_weight.value * source.log_popularity
    torch.testing.assert_close(states @ items.T, expected[None])
    source.log_popularity = None
    assert encode_catalogue(model, source)[:, -1].eq(0).all()


@pytest.mark.parametrize("user_encoder", ["transformer", "gru", "hstu", "mean"])
@pytest.mark.parametrize("modalities", ["text", "image", "text image"])
def test_every_parameter_gets_a_gradient(modalities, user_encoder):
    model, source = fitted(modalities, user_encoder=user_encoder, num_items=ITEMS)
    for projection in (module for module in model.modules() if isinstance(module, WhitenedProjection)):
        torch.nn.init.normal_(projection.output.weight, std=0.1)  # at zero nothing reaches what is below
    torch.nn.init.normal_(model.content_prior.output.weight, std=0.1)
    batch = make_collator(model.config, source=source, counts=np.arange(ITEMS) + 1)(
        [{"items": line, "user": user} for user, line in enumerate(([1, 2, 3, 4], [5, 6, 7], [8, 0]))]
    )
    model.train()(**batch).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert [name for name in idle if "_model." not in name] == []


def test_it_is_saved_and_loaded_whole(tmp_path):
    model, source = fitted(num_items=ITEMS)
    source.log_popularity = torch.linspace(-5, -1, ITEMS)
    model.save_pretrained(tmp_path)
    loaded = TransRecModel.from_pretrained(tmp_path)
    assert_same_weights(model, loaded)
    assert loaded.config.to_dict()["format_version"] == 2
    assert torch.equal(encode_catalogue(model, source), encode_catalogue(loaded, source))


def test_a_recommender_and_an_evaluator_take_it():
    model, source = fitted()
    source.log_popularity = torch.linspace(-5, -1, ITEMS)
    assert len(Recommender(model, source).recommend(["item-3", "item-4"], k=3)) == 3
    report = RankingEvaluator(source, make_split().test).evaluate(model)
    assert 0 <= report["metrics"]["ndcg@10"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"similarity": "euclidean"}, "similarity must be one of"),
        ({"item_map": "tree"}, "item_map must be one of"),
        ({"num_items": 3, "objective": "full_softmax"}, "needs objective 'in_batch'"),
        ({"user_hidden_size": 9}, "user_hidden_size .* multiple"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        make_config("text", **{**DESIGN, **fields})


# The hybrid


def test_the_decay_is_fitted_to_how_users_walk():
    """Items of content in a circle: who goes on from the last one alone, or from the last two alike."""
    rng = np.random.default_rng(0)
    content = torch.nn.functional.normalize(torch.randn(400, 32), dim=1)
    for share in (0.4, 0.8):
        lines = []
        for _ in range(60):
            line = rng.integers(400, size=2).tolist()
            for _ in range(20):
                wanted = content[line[-1]] + share * content[line[-2]] + 0.1 * torch.randn(32)
                wanted = content @ wanted
                wanted[line[-3:]] = -9
                line.append(int(wanted.argmax()))
            lines.append(np.array(line))
        assert fitted_decay(content, make_sequences(lines)) == pytest.approx(share, abs=0.2)
    assert fitted_decay(content, make_sequences(lines[:1])) is None


def test_a_new_decay_is_fitted_and_a_trained_one_stays(monkeypatch):
    monkeypatch.setattr("transrec_hf.items.meeting.fitted_decay", lambda content, train: 0.4)
    for value in (None, 0.1):
        model, source = fitted()
        if value is not None:
            torch.nn.init.constant_(model.content_prior.decay, value)
        start_from_data(model, source, make_split(num_users=2).train)
        assert model.content_prior.decay.item() == pytest.approx(np.log(0.4 / 0.6) if value is None else value)


def test_id_vectors_begin_as_the_content_of_neighbours():
    """Checked item by item; vectors that know something, and those of other item maps, stay as they are."""
    plain, source = fitted()
    hybrid = fresh(num_items=ITEMS)
    hybrid.load_state_dict(plain.state_dict(), strict=False)
    content = encode_catalogue(plain, source)[:, :-1]  # without the column of popularity
    split = make_split(num_users=3, lengths=(4, 6))
    chosen = [user["items"].tolist() for user in split.train]
    neighbours: list[Counter[int]] = [Counter() for _ in range(ITEMS)]
    for line in chosen:
        for a, b in itertools.combinations(range(len(line)), 2):
            if b - a <= 3 and line[a] != line[b]:
                neighbours[line[a]][line[b]] += 1
                neighbours[line[b]][line[a]] += 1
    start_from_data(hybrid, source, split.train)
    vectors = hybrid.item_encoder.item_embedding.weight.detach()
    for counts, vector in zip(neighbours, vectors, strict=True):
        n = counts.total()
        total = sum(count * content[j] / (1 + neighbours[j].total()) ** 0.5 for j, count in counts.items())
        expected = 0.75 * n / (n + 10) * total / total.norm() * 0.1 * 16**0.5 if n else torch.zeros(16)
        torch.testing.assert_close(vector, expected)
    assert vectors.any() and not vectors[[n == Counter() for n in neighbours]].any()
    with torch.no_grad():
        vectors.fill_(1)
    start_from_data(hybrid, source, split.train)
    assert vectors.eq(1).all()
    linear = fresh(num_items=ITEMS, item_map="linear")
    start_from_data(linear, source, split.train)
    assert not linear.item_encoder.item_embedding.weight.any()


def test_a_hybrid_begins_as_its_content_and_leaves_cold_items_alone(tmp_path):
    plain, source = fitted()
    hybrid = fresh(num_items=ITEMS)
    hybrid.load_state_dict(plain.state_dict(), strict=False)  # but for the ID vectors
    torch.testing.assert_close(encode_catalogue(hybrid, source), encode_catalogue(plain, source))
    split = make_split(num_users=2, lengths=(4, 5))
    trainer = make_trainer(tmp_path, model=hybrid, catalogue=source.catalogue, split=split)
    trainer.train()
    cold = split.train.item_counts(ITEMS) == 0
    vectors = hybrid.item_encoder.item_embedding.weight.detach()
    assert cold.any() and vectors[torch.from_numpy(cold)].eq(0).all()
    assert vectors[torch.from_numpy(~cold)].abs().sum(dim=1).gt(0).all()


# Starts


def trained(tmp_path) -> TransRecModel:
    model = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trained_from(folder) -> tuple[TransRecModel, TransRecModel]:
    """A model whose text tower comes from a folder, before and after training."""
    before, after = fresh(), trained(folder)
    before.item_encoder.text_model.save_pretrained(folder / "tower")
    for model in (before, after):
        model.item_encoder.text_model.config._name_or_path = str(folder / "tower")
    return before, after


@pytest.mark.parametrize("init", [init for init in INITS if init not in ("features", "audio", "video", "codes")])
def test_a_start_keeps_the_part_that_it_names(tmp_path, init):
    model = trained(tmp_path)
    before = {name: value.clone() for name, value in model.named_parameters()}
    start = start_from(model, init)
    kept = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    groups = {
        "text": "item_encoder.text_projection.",
        "image": "item_encoder.visual_projection.",
        "user": "user_encoder.",
    }
    has = {group: any(name.startswith(prefix) for name in kept) for group, prefix in groups.items()}
    wanted = {
        "all": {"text", "image", "user"},
        "item_encoder": {"text", "image"},
        "user_encoder": {"user"},
        "text": {"text"},
        "image": {"image"},
    }.get(init, set())
    assert {group for group, there in has.items() if there} == wanted
    assert all(name in kept for name in before if "_model." in name), "towers keep what they learned"
    assert ("user_encoder" in start.loaded) == (init in ("all", "half", "user_encoder"))


def test_what_was_added_to_a_checkpoint_is_new(tmp_path):
    """Side networks and ID vectors that are still zero do not come from the source, whatever is kept of it."""
    model = trained(tmp_path)
    model.add_side(4)
    set_item_vectors(model, torch.zeros(7, model.config.hidden_size))
    added = {"item_encoder.text_side", "item_encoder.image_side", "item_encoder.item_embedding"}
    for init in ("all", "half"):
        start = start_from(model, init)
        assert set(start.new) == added and "item_encoder.text_model" in start.loaded
    with torch.no_grad():
        model.item_encoder.text_side.output.weight.add_(1)
    assert "item_encoder.text_side" in start_from(model, "all").loaded


def test_from_scratch_the_towers_are_as_they_were(tmp_path):
    before, model = trained_from(tmp_path)
    assert has_trained_towers(model) and not has_trained_towers(before)
    learned = {name: value.clone() for name, value in model.named_parameters()}
    start = start_from(model, "scratch")
    assert "item_encoder.text_model" in start.new and "item_encoder.vision_model" in start.loaded
    start_from(before, "none")
    for name, value in model.named_parameters():
        expected = learned if ".vision_model." in name else dict(before.named_parameters())
        assert torch.equal(value, expected[name]), name


def test_a_new_model_can_have_the_towers_of_others(tmp_path):
    before, after = trained_from(tmp_path)
    other = TransRecModel(make_config("image"))
    other.save_pretrained(tmp_path / "other")
    after.save_pretrained(tmp_path / "trained")
    named = {"text_model": str(tmp_path / "trained"), "vision_model": str(tmp_path / "other")}
    model = TransRecModel.from_text_vision_pretrained(**named)
    for tower, source in (("text_model", after), ("vision_model", other)):
        expected = getattr(source.item_encoder, tower).state_dict()
        torch.testing.assert_close(getattr(model.item_encoder, tower).state_dict(), expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "both")
    model = TransRecModel.from_pretrained(tmp_path / "both")
    start_from(model, "scratch")  # the text tower as it was before all training
    assert torch.equal(*(next(of.item_encoder.text_model.parameters()) for of in (model, before)))
    with pytest.raises(ValueError, match="has no text_model: name another encoder"):
        TransRecModel.from_text_vision_pretrained(text_model=str(tmp_path / "other"))


def test_towers_that_cannot_be_read_are_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    _, model = trained_from(tmp_path)
    model.config._name_or_path = "someone/films"
    assert not has_trained_towers(model) and "which is a folder of this machine" in caplog.text
    model.config._name_or_path = ""
    (tmp_path / "tower").rename(tmp_path / "moved")
    caplog.clear()
    assert not has_trained_towers(model) and "which cannot be read" in caplog.text
    with pytest.raises(ValueError, match="the text tower comes from"):
        start_from(model, "scratch")


def test_a_source_whose_towers_do_harm_is_left(tmp_path):
    before, model = trained_from(tmp_path)
    with torch.no_grad():
        for parameter in model.item_encoder.text_model.parameters():
            parameter.zero_()  # all texts are alike

    options = {"num_train_epochs": 0, "activation_store": str(tmp_path / "store"), "trainable_blocks": 0}
    main = make_trainer(tmp_path / "run", model=model, **options)
    main.fill_store()

    def short_run(folder, init):
        trainer = make_trainer(folder, model=model, **options)
        if init != "scratch":
            trainer.store, trainer.source = main.store, main.source
        return trainer

    start = choose_start(model, short_run)
    assert set(start.values) == set(AUTO_INITS) and start.values["scratch"] != start.values["none"]
    before.item_encoder.vision_model.load_state_dict(model.item_encoder.vision_model.state_dict())
    alone = make_trainer(tmp_path / "alone", model=before, num_train_epochs=0)
    start_from(before, "none")
    alone.prepare_model()
    assert start.values["scratch"] == pytest.approx(alone.evaluate()["eval_ndcg@10"])


def test_half_is_half_way_to_a_new_model(tmp_path):
    model, other = trained(tmp_path), trained(tmp_path)
    other.load_state_dict(model.state_dict())
    name = "content_prior.output.weight"
    full = model.get_parameter(name).clone()
    start_from(model, "half"), start_from(other, "none")
    torch.testing.assert_close(model.get_parameter(name), (full + other.get_parameter(name)) / 2)


@pytest.mark.parametrize("init", ["some", "features"])
def test_an_unknown_start_is_refused(init):
    with pytest.raises(ValueError, match="must be one of 'all', 'half'"):
        start_from(fresh(), init)


def test_the_start_that_validation_prefers_wins(tmp_path):
    model = trained(tmp_path)
    with torch.no_grad():
        model.content_prior.output.weight.mul_(100)  # a source that does harm
    options = {"eval_strategy": "epoch", "eval_on_start": True, "num_train_epochs": 1, "learning_rate": 1e-6}
    start = choose_start(model, lambda folder, init: make_trainer(folder, model=model, **options))
    values, best = start.values, start.init
    assert set(values) == {*AUTO_INITS} - {"scratch"}
    assert (best == "none" or values[best] == max(values.values())) and best != "all"
    assert start.standardized == ["text", "image"] and f"On validation {best} {values[best]:.4f}, " in str(start)
    expected = trained(tmp_path)
    start_from(expected, best)
    assert_same_weights(model, expected)


@pytest.mark.parametrize(
    ("half", "ranks", "best"),
    [
        (0.51, [1.0] * 8, "half"),
        (0.509, [1.0] * 8, "none"),
        (0.4, [1.0] * 8, "none"),
        (0.6, [1.0] * 3 + [3.0] * 5, "none"),  # .056 in ndcg@10, and three quarters of a standard error are .069
        (0.6, [1.0] * 6 + [3.0] * 10, "half"),  # the same for twice as many users: .047
        (0.6, [1.0], "none"),
    ],
)
def test_a_source_has_to_be_worth_more_than_chance(tmp_path, monkeypatch, half, ranks, best):
    """
    One per cent on validation is not enough, nor the luck of few users; and with no epochs the starts are compared as
    they are.
    """
    model = trained(tmp_path)
    said = {"none": (0.5, [2.0] * len(ranks)), "half": (half, ranks)}

    def compared(folder, init):
        trainer = make_trainer(folder, model=model, num_train_epochs=0)
        value, trainer.ranks = said[init][0], torch.tensor(said[init][1])

        def evaluate():
            of_run = trainer.args, trainer.state, trainer.control
            trainer.callback_handler.on_evaluate(*of_run, {"eval_ndcg@10": value})

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        monkeypatch.setattr(trainer, "train", None)
        return trainer

    start = choose_start(model, compared, ("none", "half"))
    assert start.init == best and start.values == {"none": 0.5, "half": half}


def test_a_metric_of_ones_own_decides_too(tmp_path):
    """It has no values of single users, so that chance cannot be told from a gain."""
    model, values = trained(tmp_path), iter([0.5, 0.6])
    options = {"num_train_epochs": 0, "metric_for_best_model": "mine"}

    def compared(folder, init):
        value = next(values)
        trainer = make_trainer(folder, model=model, **options)
        trainer.compute_metrics = lambda _: {"mine": value}
        return trainer

    assert choose_start(model, compared, ("none", "half")).init == "half"


def test_the_ranks_of_the_best_epoch_are_compared(tmp_path):
    model = fresh()
    trainer = make_trainer(tmp_path, model=model, num_train_epochs=2, eval_strategy="epoch", eval_on_start=True)
    best = best_evaluation(trainer)
    curve = learning_curve(trainer)
    assert len(curve) == 3 and best.value == max(curve.values())
    assert metric_values(best.ranks, "ndcg@10").double().mean().item() == pytest.approx(best.value)


def test_the_guard_ranks_all_validation_users(tmp_path):
    model = trained(tmp_path)

    def value(**few):
        options = {"model": model, "num_train_epochs": 0, **few}
        return choose_start(model, lambda folder, init: make_trainer(folder, **options), ("all",)).values["all"]

    assert value(max_eval_users=2) == value()


@pytest.mark.parametrize(
    ("values", "is_start"), [([0.5, 0.4, 0.3], True), ([0.5, 0.5, 0.3], True), ([0.5, 0.6], False)]
)
def test_a_run_cannot_end_below_its_start(tmp_path, monkeypatch, values, is_start):
    model, source = fitted()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "eval_on_start": True,
        "num_train_epochs": len(values) - 1,
    }
    trainer = make_trainer(tmp_path, model=model, catalogue=source.catalogue, **options)
    said, rank = iter(values), trainer._rank

    def ranked(*args, **kwargs):
        output = rank(*args, **kwargs)
        output.metrics["eval_ndcg@10"] = next(said)
        return output

    monkeypatch.setattr(trainer, "_rank", ranked)
    trainer.train()
    assert trainer.state.best_metric == max(values)
    same = all(torch.equal(value.cpu(), start[name]) for name, value in model.state_dict().items())
    assert same == is_start


def test_the_paper_and_older_checkpoints_keep_their_design():
    for config in (TransRecConfig.paper(), TransRecConfig.from_dict({"format_version": 1, "hidden_size": 32})):
        assert (config.item_map, config.similarity, config.content_prior) == ("linear", "dot", False)
        assert config.to_dict()["format_version"] == 1
    assert TransRecConfig().to_dict()["format_version"] == 2
