"""Pre-training on several domains: batches, statistics and reports of one domain each."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from testing_utils import make_catalogue, make_config, make_processor, make_split
from torch.utils.data import DataLoader

from transrec_hf import DataError, TransRecModel, TransRecTrainingArguments, load_catalogue
from transrec_hf.commands.runs import pretrain
from transrec_hf.commands.transfer import check_no_source
from transrec_hf.data import demo
from transrec_hf.data.demo import demo_world
from transrec_hf.items.meeting import ItemStatistics
from transrec_hf.training.collator import TrainingWindows
from transrec_hf.training.mixing import MixedTrainer, MixedWindows, OneDomainABatch
from transrec_hf.training.similarity import GradientSimilarity
from transrec_hf.training.stages import UserEncoderFirst


DESIGN = {"item_map": "whitened", "similarity": "cosine", "content_prior": True, "popularity_prior": True}


def mixed_trainer(folder, mixing=None, **fields):
    torch.manual_seed(0)
    model = TransRecModel(make_config("text", **{**DESIGN, **fields}))
    args = TransRecTrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    domains = {
        "small": (make_catalogue(9, kinds=("text",)), make_split(num_users=5, num_items=9)),
        "large": (make_catalogue(14, kinds=("text",)), make_split(num_users=20, num_items=14, seed=1)),
    }
    return MixedTrainer(model, args, domains=domains, processing_class=make_processor("text"), **(mixing or {}))


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 10 / 11), (0.5, 0.76), (0.0, 0.5)])
def test_batches_are_of_one_domain_drawn_by_the_temperature(temperature, share):
    sizes = (80, 800)
    parts = [TrainingWindows(make_split(num_users=size, num_items=9).train, 6) for size in sizes]
    windows = MixedWindows(parts)
    sampler = OneDomainABatch(windows, 8, temperature)
    order = list(sampler)
    assert len(order) == len(sampler) == sum(-(-len(part) // 8) for part in parts) * 8
    domains = np.array([windows[index]["domain"] for index in order]).reshape(-1, 8)
    assert (domains == domains[:, :1]).all()
    assert abs(domains[:, 0].mean() - share) < 0.1
    assert list(sampler) == order
    windows.set_epoch(1)
    assert list(sampler) != order


def test_each_batch_meets_the_statistics_of_its_domain(tmp_path, monkeypatch):
    trainer = mixed_trainer(tmp_path)
    trainer.prepare_model()
    means = {name: statistics[0]["mean"] for name, statistics in trainer.whitening.items()}
    assert not torch.equal(means["small"], means["large"])
    assert isinstance(trainer.get_train_dataloader(), DataLoader)
    seen = []
    forward = TransRecModel.forward

    def spy(self, *args, **kwargs):
        here = self.item_encoder.text_projection.mean
        domain = next(name for name, mean in means.items() if torch.equal(mean, here))
        popularity = trainer.parts[domain].source.log_popularity
        rows = kwargs["items"].item_rows
        assert torch.allclose(kwargs["log_popularity"], popularity[rows])
        seen.append(domain)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TransRecModel, "forward", spy)
    trainer.train()
    assert set(seen) == {"small", "large"}
    assert torch.equal(trainer.model.item_encoder.text_projection.mean, means["small"])


def test_reports_pool_the_users_and_tell_the_domains_apart(tmp_path):
    trainer = mixed_trainer(tmp_path)
    report = trainer.report()
    domains = report["slices"]["domain"]
    assert {name: part["num_users"] for name, part in domains.items()} == {"small": 5, "large": 20}
    expected = (5 * domains["small"]["mrr"] + 20 * domains["large"]["mrr"]) / 25
    assert report["metrics"]["mrr"] == pytest.approx(expected) and report["protocol"]["num_users"] == 25
    low, high = report["intervals"]["mrr"]
    assert low < expected < high and set(report["baselines"]) == {"popularity", "repeat_last", "co_occurrence"}


def test_id_vectors_are_of_one_catalogue(tmp_path):
    with pytest.raises(ValueError, match="ID vectors belong to one catalogue"):
        mixed_trainer(tmp_path, num_items=9)


def test_the_user_encoder_learns_first(tmp_path):
    """In an epoch of its own it moves, and the item encoder does not; in the next one both do."""
    trainer = mixed_trainer(tmp_path)
    trainer.add_callback(UserEncoderFirst(1))
    trainer.args.num_train_epochs, trainer.args.load_best_model_at_end = 1, False
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}

    def moved():
        changed = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
        return {name.split(".")[0] for name in changed}

    trainer.train()
    assert "user_encoder" in moved() and "item_encoder" not in moved()
    trainer.args.num_train_epochs = 2
    trainer.train()
    assert {"user_encoder", "item_encoder"} <= moved()


def test_the_command_trains_on_two_domains_and_records_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SOURCE", dataclasses.replace(demo.SOURCE, num_items=48, num_users=40))
    monkeypatch.setattr(demo, "TARGET", dataclasses.replace(demo.TARGET, num_items=40, num_users=30))
    monkeypatch.chdir(tmp_path)
    demo_world().target.save("other")
    options = ["--data", "demo:source", "--more_data", "other", "--output_dir", "run", "--num_train_epochs", "1"]
    options += [
        "--per_device_train_batch_size",
        "16",
        "--use_cpu",
        "--trainable_blocks",
        "0",
        "--disable_tqdm",
        "True",
    ]
    report = pretrain(options)
    assert report["protocol"]["num_users"] == 70 and "domain: other" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Trained on unnamed data and other." in card and "| data | other |" in card and "| items | 40:" in card
    told = json.loads((tmp_path / "run" / "data_statistics.json").read_text())
    assert told["num_items"] == 88 and [domain["num_items"] for domain in told["domains"]] == [48, 40]
    with pytest.raises(DataError, match="was trained on this data set"):
        check_no_source("run", "other", load_catalogue("other"), np.ones(40))
    with pytest.raises(DataError, match="demo:source is given twice"):
        pretrain([*options[:3], "demo:source", "--output_dir", "none", *options[6:]])
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    shutil.copy(tmp_path / "other" / "items.parquet", tmp_path / "short")
    events = pd.read_parquet(tmp_path / "other" / "interactions.parquet").drop_duplicates("user_id")
    events.to_parquet(tmp_path / "short" / "interactions.parquet")
    for name, said in (("empty", "empty"), ("short", "^short: no user has 3 interactions")):
        with pytest.raises(DataError, match=said):
            pretrain([*options[:3], name, "--output_dir", "none", *options[6:]])
    assert not (tmp_path / "none").exists()


def test_a_target_is_found_among_sources_that_number_their_items_from_one(tmp_path):
    catalogue, rng = make_catalogue(30, kinds=("text",)), np.random.default_rng(0)
    counts = rng.integers(1, 100, size=(3, 30))
    ItemStatistics(np.tile(catalogue.item_ids, 2), counts[:2].reshape(-1)).save(tmp_path)
    domains = [{"source": f"shop {n}", "num_items": 30} for n in range(2)]
    (tmp_path / "data_statistics.json").write_text(json.dumps({"domains": domains}))
    for same in counts[:2]:
        with pytest.raises(DataError, match="was trained on this data set"):
            check_no_source(str(tmp_path), "target", catalogue, same)
    check_no_source(str(tmp_path), "target", catalogue, counts[2])


TOWARDS = {"similarity": "grad_cosine", "target": "small"}


class Shared(torch.nn.Module):
    """What is shared has two weights, and there is one more."""

    def __init__(self):
        super().__init__()
        self.user_encoder = torch.nn.Linear(2, 1, bias=False)
        self.rest = torch.nn.Parameter(torch.zeros(()))

    def step(self, similarity, domain, gradient):
        """What a step with this gradient is weighed to: its last weight."""
        self.user_encoder.weight.grad = torch.tensor([gradient])
        self.rest.grad = torch.ones(())
        similarity.domain = domain
        similarity.on_pre_optimizer_step(None, None, None, model=self)
        weight = float(self.rest.grad)
        assert self.user_encoder.weight.grad.tolist()[0] == pytest.approx([part * weight for part in gradient])
        return weight


def test_steps_count_by_how_much_they_go_the_way_of_the_target(caplog):
    model, similarity = Shared(), GradientSimilarity(("target", "like", "half", "against"), "target")
    assert model.step(similarity, "like", [1.0, 0.0]) == 1.0  # the target is not known yet
    assert model.step(similarity, "target", [1.0, 0.0]) == 1.0
    assert model.step(similarity, "like", [3.0, 0.0]) == 1.0
    assert model.step(similarity, "half", [1.0, 3**0.5]) == pytest.approx(0.5)
    assert model.step(similarity, "against", [-1.0, 0.5]) == 0.0
    assert model.step(similarity, "target", [-1.0, 0.0]) == 1.0  # .9 of the first and .1 of this: where it went
    assert similarity.matrix()["half"]["target"] == pytest.approx(0.5)
    assert similarity.matrix()["half"]["against"] == pytest.approx((-1 + 3**0.5 / 2) / 2 / 1.25**0.5, rel=1e-4)
    similarity.on_train_end(None, None, None)
    assert "against pulls against target" in caplog.text and "half pulls" not in caplog.text


def test_a_run_towards_a_target_tells_who_helps_whom(tmp_path):
    trainer = mixed_trainer(tmp_path, TOWARDS)
    trainer.train()
    cosines = trainer.report()["gradient_cosines"]
    assert set(cosines) == {"small", "large"} and -1 <= cosines["large"]["small"] <= 1
    assert cosines["small"]["small"] == pytest.approx(1)
    assert cosines["large"]["small"] == pytest.approx(cosines["small"]["large"]) != 0
    assert any("cosine_large" in entry for entry in trainer.state.log_history)


def test_a_target_that_cannot_be_compared_with_and_an_empty_domain_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the target 'other' must be one of the data sets, which are small, large"):
        mixed_trainer(tmp_path, {**TOWARDS, "target": "other"})
    with pytest.raises(ValueError, match="need each other"):
        mixed_trainer(tmp_path, {"target": "small"})
    with pytest.raises(ValueError, match="similarity must be one of"):
        mixed_trainer(tmp_path, {**TOWARDS, "similarity": "cosine"})
    trainer = mixed_trainer(tmp_path)
    split = make_split(num_users=3, num_items=9, lengths=(4, 4))
    bare = dataclasses.replace(split, train=split.train.select(np.arange(0)))
    domains = {name: (part.catalogue, part.split) for name, part in trainer.parts.items()}
    alone = dataclasses.replace(split, train=split.train.select(np.arange(1)))
    wrong = {
        "bare": (bare, "no training sequence has two items"),
        "alone": (alone, "objective 'in_batch' takes the items of other users .* Take more users"),
        "again": (domains["small"][1], "holds the same items and histories as small. Remove one"),
    }
    for name, (part, said) in wrong.items():
        more = {**domains, name: (make_catalogue(9, kinds=("text",)), part)}
        with pytest.raises(DataError, match=f"^{name}: {said}"):
            MixedTrainer(trainer.model, trainer.args, domains=more, processing_class=make_processor("text"))
