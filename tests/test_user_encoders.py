"""User encoders: what all of them promise, and what each one computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from testing_utils import (
    DROPOUT,
    assert_same_weights,
    gradients,
    logged,
    make_batch,
    make_catalogue,
    make_collator,
    make_config,
    make_model,
    make_sequences,
    make_trainer,
)
from torch import Tensor, nn
from transformers import AutoModel

from transrec_hf import ItemSource, RankingEvaluator, Recommender, TransRecConfig, TransRecModel
from transrec_hf.data.interactions import Sequences
from transrec_hf.model import configuration_transrec
from transrec_hf.model.user_encoder_transrec import USER_ENCODERS, Packing, UserEncoder
from transrec_hf.training.collator import TrainingWindows


LONGEST, HIDDEN = 6, 16  # of the models of `make_config`
ENCODERS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "bidirectional": {"is_causal": False, "objective": "cpc"},
    "gru": {"user_encoder": "gru"},
    "hstu": {"user_encoder": "hstu"},
    "hstu with time": {"user_encoder": "hstu", "time_buckets": 8},
    "mean": {"user_encoder": "mean"},
}


@pytest.fixture(params=ENCODERS)
def config(request) -> TransRecConfig:
    return make_config(**ENCODERS[request.param])


@pytest.fixture
def encoder(config) -> nn.Module:
    return make_model(config).user_encoder


def make_histories(lengths: list[int], padded_to: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    """Vectors, mask, combinations of modalities and times of histories; garbage in the padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), padded_to or max(lengths))
    vectors = torch.randn(*shape, HIDDEN, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    combination = torch.randint(0, 3, shape, generator=generator).where(mask, -1)
    steps = torch.randint(0, 100, shape, generator=generator)
    return vectors, mask, combination, 1_700_000_000 + steps.cumsum(dim=1)


def read(encoder: nn.Module, histories: tuple[Tensor, ...], user: int, length: int) -> Tensor:
    """States of the first `length` items of one user, read alone."""
    return encoder(*(tensor[user : user + 1, :length] for tensor in histories))[0]


def test_the_table_holds_what_a_configuration_may_name():
    assert tuple(USER_ENCODERS) == configuration_transrec.USER_ENCODERS


# What all of them promise


def test_a_state_depends_on_what_it_may_see_and_on_all_of_it(config, encoder):
    vectors, mask, *others = make_histories([5, 3, 1])
    vectors.requires_grad_()
    states = encoder(vectors, mask, *others)
    allowed = mask[:, None, :] & mask[:, :, None]
    if config.is_causal:
        allowed &= torch.ones(5, 5).tril().bool()
    for position in range(5):
        (gradient,) = torch.autograd.grad(states[:, position].square().sum(), vectors, retain_graph=True)
        assert torch.equal(gradient.abs().amax(dim=-1) > 0, allowed[:, position])


def test_states_are_those_of_a_user_alone_and_zero_in_the_padding(encoder):
    lengths = [2, 5, 1]
    histories = make_histories(lengths, padded_to=LONGEST)
    states = encoder(*histories)
    assert states.shape == histories[0].shape
    assert states[~histories[1]].eq(0).all()
    for user, length in enumerate(lengths):
        torch.testing.assert_close(states[user, :length], read(encoder, histories, user, length))


def test_an_empty_history_gives_zeros_and_finite_gradients(encoder):
    vectors, *others = make_histories([0, 2])
    states = encoder(vectors.requires_grad_(), *others)
    states.sum().backward()
    assert states[0].eq(0).all()
    assert vectors.grad is not None and vectors.grad.isfinite().all()


def test_every_parameter_gets_a_gradient(config, encoder):
    vectors, *others = make_histories([LONGEST, 3])
    encoder.train()(vectors.requires_grad_(), *others).square().sum().backward()
    assert all(gradient is not None and gradient.abs().max() > 1e-8 for gradient in gradients(encoder).values())


def test_order_matters_to_all_but_the_mean(config, encoder):
    vectors, *others = make_histories([3])
    one, other = (encoder(vectors[:, order], *others)[0, -1] for order in ([0, 1, 2], [1, 0, 2]))
    assert torch.allclose(one, other, atol=1e-6) == (config.user_encoder == "mean")


def test_modalities_matter_to_all_but_the_mean(config, encoder):
    vectors, mask, combination, timestamps = make_histories([3])
    states = [encoder(vectors, mask, torch.full_like(combination, kind), timestamps)[0] for kind in range(3)]
    if config.user_encoder == "mean":
        assert torch.equal(states[0], states[1])
        return
    assert torch.pdist(torch.stack(states).flatten(1)).min() > 1e-3
    with pytest.raises(ValueError, match="needs item_modalities"):
        encoder(vectors, mask, None, timestamps)


def test_a_checkpoint_gives_the_same_states(config, tmp_path):
    model = make_model(config)
    model.save_pretrained(tmp_path)
    loaded, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert_same_weights(loaded, model)
    histories = make_histories([4, 2])
    assert torch.equal(loaded.user_encoder(*histories), model.user_encoder(*histories))


def test_weights_that_a_checkpoint_lacks_start_like_fresh_ones(config, tmp_path):
    """A domain may begin with the items of another and another user encoder."""
    make_model(make_config(user_encoder="mean")).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, config=config)
    for name, parameter in loaded.user_encoder.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 3, name
        is_bias = name.split(".")[-1].startswith("bias")
        assert (parameter.std() == 0) == (is_bias or "norm" in name), name


def test_bf16_is_close(encoder):
    vectors, *others = make_histories([5, 3])
    expected = encoder(vectors, *others)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(vectors, *others)
    states = encoder.bfloat16()(vectors.bfloat16(), *others)
    assert states.dtype == torch.bfloat16
    for found in (mixed, states):  # on the average: a norm of HSTU makes much of the sign of a score near 0
        assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "mean"])
def test_gradient_checkpointing_changes_nothing(name):
    found = []
    for checkpointed in (False, True):
        model = make_model(make_config("", num_items=12, **ENCODERS[name], **DROPOUT)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.user_encoder.layers)
        torch.manual_seed(1)
        model.user_encoder(*make_histories([5, 3])).square().sum().backward()
        found.append(gradients(model.user_encoder))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gru", pytest.param("hstu with time", marks=pytest.mark.slow), "mean"])
def test_compiled_layers_change_nothing(name):
    config = make_config("", num_items=12, num_hidden_layers=1, **ENCODERS[name])
    plain, compiled = make_model(config), make_model(config)
    compiled.compile_blocks(backend="aot_eager")
    for lengths in ([5, 3], [2, 4, 1]):
        histories = make_histories(lengths)
        torch.testing.assert_close(compiled.user_encoder(*histories), plain.user_encoder(*histories))


def test_a_checkpoint_has_the_lowest_format_that_reads_it(config):
    """The code of version 0.1.0 reads format 1, and would take any user encoder for a Transformer."""
    assert config.to_dict()["format_version"] == (1 if config.user_encoder == "transformer" else 2)


# Export


DIMS = {0: torch.export.Dim("users", min=2, max=4096), 1: torch.export.Dim("length", min=2, max=LONGEST)}


def test_torch_export_takes_any_number_of_users_and_any_length(encoder):
    exported = torch.export.export(encoder, make_histories([4, 2, 3]), dynamic_shapes=(DIMS,) * 4).module()
    for lengths in ([2, 1], [LONGEST, 3, 1, 5, 2]):
        histories = make_histories(lengths)
        torch.testing.assert_close(exported(*histories), encoder(*histories), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_takes_any_number_of_users_and_any_length(encoder, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "user_encoder.onnx"
    program = torch.onnx.export(
        encoder, make_histories([4, 2, 3]), dynamo=True, dynamic_shapes=(DIMS,) * 4, verbose=False
    )
    program.save(file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for lengths in ([2, 1], [LONGEST, 3, 1, 5, 2], [1]):  # a baked shape shows only with another one
        histories = make_histories(lengths)
        names = [argument.name for argument in session.get_inputs()]
        (states,) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in histories), strict=True)))
        np.testing.assert_allclose(states, encoder(*histories).detach().numpy(), rtol=1e-3, atol=1e-4)


# Training


@pytest.mark.parametrize("name", ["gru", "hstu with time", "mean"])
@pytest.mark.parametrize("modalities", ["text", ""], ids=["text", "ids"])
def test_a_trainer_lowers_the_loss(name, modalities, tmp_path):
    items = {} if modalities else {"num_items": 12}
    model = make_model(make_config(modalities, **items, **ENCODERS[name]))
    catalogue = make_catalogue(kinds=("text",))
    trainer = make_trainer(tmp_path, model=model, catalogue=catalogue, num_train_epochs=6, eval_strategy="epoch")
    trainer.train()
    losses = list(logged(trainer).values())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("objective", [name for name in configuration_transrec.OBJECTIVES if name != "masked"])
def test_every_objective_takes_every_causal_encoder(objective):
    for name in ("gru", "hstu", "mean"):
        config = make_config("", num_items=12, objective=objective, **ENCODERS[name])
        model = make_model(config).train()
        model(**make_batch(config)).loss.backward()
        assert all(gradient is not None for gradient in gradients(model).values())


# What each one computes


def test_the_mean_is_that_of_the_items_so_far():
    encoder = make_model(make_config(user_encoder="mean")).user_encoder
    vectors, *others = make_histories([4])
    expected = torch.stack([vectors[0, : position + 1].mean(dim=0) for position in range(4)])
    torch.testing.assert_close(encoder(vectors, *others)[0], expected)
    assert not list(encoder.parameters())


def test_the_gru_passes_on_its_state():
    """Read item by item, as a service may, the first layer gives what it gives for the whole history."""
    layer = make_model(make_config(user_encoder="gru")).user_encoder.layers[0]
    vectors = make_histories([4])[0]
    state, states = None, []
    for position in range(4):
        output, state = layer.gru(vectors[:, position : position + 1], state)
        states.append(output)
    torch.testing.assert_close(layer(vectors), torch.cat(states, dim=1))


@pytest.mark.parametrize("time_buckets", [0, 4])
def test_hstu_attends_as_the_paper_says(time_buckets):
    """Equations 1 to 3 of arXiv 2402.17152, number by number."""
    config = make_config(user_encoder="hstu", time_buckets=time_buckets)
    encoder = make_model(config).user_encoder
    layer = encoder.layers[0]
    attention, heads, size = layer.attention, config.num_attention_heads, HIDDEN // config.num_attention_heads
    vectors, mask, _, times = make_histories([5])
    times = torch.tensor([[0, 0, 1, 6, 1000]])  # buckets of the differences: 0, 1 .. 2, 3 and, for all longer ones, 3
    silu = nn.functional.silu

    x = layer.attention_norm(vectors[0])
    u, q, k, v = silu(attention.projection(x)).split(HIDDEN, dim=-1)
    rows = []
    for i in range(5):
        attended = []
        for head in range(heads):
            part, total = slice(head * size, (head + 1) * size), torch.zeros(size)
            for j in range(i + 1):
                score = q[i, part] @ k[j, part] + attention.position_bias.weight[i - j, head]
                if time_buckets:
                    bucket = min(int(np.log2(1 + int(times[0, i] - times[0, j]))), time_buckets - 1)
                    score = score + attention.time_bias.weight[bucket, head]
                total = total + silu(score) * v[j, part] / LONGEST
            attended.append(total)
        rows.append(vectors[0, i] + attention.output(attention.norm(torch.cat(attended)) * u[i]))

    seen = []
    layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs, output)))
    encoder(vectors, mask, torch.zeros(1, 5, dtype=torch.long), times)
    ((_, packing, *biases), _) = seen[0]
    torch.testing.assert_close(layer(vectors, packing, *biases)[0], torch.stack(rows))


def test_only_the_time_between_items_counts():
    encoder = make_model(make_config(user_encoder="hstu", time_buckets=16)).user_encoder
    vectors, mask, combination, timestamps = make_histories([5, 3])
    states = encoder(vectors, mask, combination, timestamps)
    assert torch.equal(encoder(vectors, mask, combination, timestamps - 1_000_000), states)
    other = encoder(vectors, mask, combination, timestamps * 64)
    assert (other[:, 1:] - states[:, 1:]).abs().amax(dim=-1)[mask[:, 1:]].min() > 1e-4
    torch.testing.assert_close(other[:, 0], states[:, 0])


def test_timestamps_are_asked_for_where_they_are_read():
    vectors, mask, combination, timestamps = make_histories([3])
    with pytest.raises(ValueError, match="time_buckets needs the timestamps"):
        make_model(make_config(user_encoder="hstu", time_buckets=4)).user_encoder(vectors, mask, combination)
    without = make_model(make_config(user_encoder="hstu")).user_encoder
    assert torch.equal(without(vectors, mask, combination), without(vectors, mask, combination, timestamps))


# One's own


class Fading(UserEncoder):
    """The example of the class."""

    def __init__(self, config: TransRecConfig):
        super().__init__(config)
        self.rate = nn.Linear(config.user_width, config.user_width)

    def read(self, hidden_states: Tensor, packing: Packing, timestamps: Tensor | None) -> Tensor:
        return torch.logcumsumexp(self.rate(hidden_states), dim=1)


class FadingModel(TransRecModel):
    user_encoder_class = Fading


def test_ones_own_encoder_trains_saves_and_loads(tmp_path):
    model = FadingModel(make_config("", num_items=12))
    trainer = make_trainer(tmp_path / "run", model=model, eval_strategy="epoch")
    trainer.train()
    model.save_pretrained(tmp_path)
    loaded = FadingModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    histories = make_histories([4, 2])
    assert torch.equal(loaded.user_encoder(*histories), model.eval().user_encoder(*histories))


# Timestamps, from the interactions to the model


def timed_model() -> TransRecModel:
    return make_model(make_config("", num_items=12, user_encoder="hstu", time_buckets=16))


@pytest.fixture
def timed_sequences() -> Sequences:
    """Three users whose interactions are minutes to days apart."""
    sequences = make_sequences([(0, 1, 2, 3, 4), (5, 3, 2), (6, 7, 8, 9, 10, 11, 0, 1)])
    return replace(sequences, timestamps=np.arange(len(sequences.items)) ** 5 * 60)


@pytest.mark.parametrize("objective", ["full_softmax", "cpc"])
def test_a_collator_gives_the_time_of_each_item_read(objective, timed_sequences):
    fields = {"objective": objective, "num_positives": 2, "user_encoder": "hstu"}
    windows = TrainingWindows(timed_sequences, LONGEST, 2 if objective == "cpc" else 1)
    features = [windows[row] for row in range(len(windows))]
    assert "timestamps" not in make_collator(make_config("", num_items=12, **fields))(features)
    batch = make_collator(make_config("", num_items=12, time_buckets=4, **fields))(features)
    time_of = {(f["user"], i): t for f in features for i, t in enumerate(f["timestamps"].tolist())}
    for user, (history, times) in enumerate(zip(batch["history_index"], batch["timestamps"], strict=True)):
        real = (history >= 0).sum()
        assert times[:real].tolist() == [time_of[user, position] for position in range(real)]


def test_evaluator_and_recommender_read_the_same_times(timed_sequences):
    """The rank of a target is its place in the recommendations."""
    model, source = timed_model(), ItemSource(make_catalogue())
    evaluator = RankingEvaluator(source, timed_sequences, protocol="full")
    ranks = evaluator.rank_model(model).ranks.tolist()
    recommender, ids = Recommender(model, source), source.catalogue.item_ids
    histories = [ids[user["items"][:-1]].tolist() for user in timed_sequences]
    times = [user["timestamps"][:-1].tolist() for user in timed_sequences]
    targets = [ids[user["items"][-1]] for user in timed_sequences]

    def places(times: list[list[int]]) -> list[int]:
        found = [[item.item_id for item in items] for items in recommender.recommend(histories, 12, timestamps=times)]
        return [items.index(target) + 1 for items, target in zip(found, targets, strict=True)]

    assert places(times) == ranks
    scores = [
        recommender.recommend(histories[0], 12, timestamps=other)[0].score for other in (times[0], [0, 9, 99, 9999])
    ]
    assert abs(scores[0] - scores[1]) > 1e-4
    with pytest.raises(ValueError, match="needs the timestamps"):
        recommender.recommend(histories[0])
    with pytest.raises(ValueError, match="one entry for each item"):
        recommender.recommend(histories[0], timestamps=times[0][1:])


# Contradictions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user_encoder": "lstm"}, "user_encoder must be one of"),
        ({"user_encoder": "gru", "is_causal": False, "objective": "cpc"}, "'gru' reads histories forwards only"),
        ({"user_encoder": "hstu", "is_causal": False, "objective": "cpc"}, "'hstu' reads histories forwards only"),
        ({"user_encoder": "mean", "is_causal": False, "objective": "cpc"}, "'mean' reads histories forwards only"),
        ({"user_encoder": "hstu", "time_buckets": -1}, "time_buckets must be between 0"),
        ({"time_buckets": 8}, "'transformer' does not read timestamps"),
        ({"user_encoder": "hstu", "num_attention_heads": 3}, "must be a multiple"),
    ],
)
def test_contradictions_are_refused_with_a_sentence(fields, message):
    with pytest.raises(Exception, match=message):
        make_config(**fields)
