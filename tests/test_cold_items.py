"""Items that no training has seen are recommended the moment they arrive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from transrec_hf import (
    ItemSource,
    Recommender,
    TransRecModel,
    TransRecTrainer,
    TransRecTrainingArguments,
    keep_items,
    leave_one_out,
)
from transrec_hf.data.demo import demo_config, demo_processor, demo_world


@pytest.mark.slow
def test_a_tenth_of_the_items_is_found_though_training_had_none_of_it(tmp_path: Path) -> None:
    platform = demo_world().source
    catalogue, sequences = platform.catalogue, platform.sequences
    cold = np.zeros(len(catalogue), dtype=bool)
    cold[np.random.default_rng(0).permutation(len(catalogue))[: len(catalogue) // 10]] = True
    warm, warm_sequences = keep_items(catalogue, sequences, ~cold)
    arguments = TransRecTrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=128,
        learning_rate=2e-3,
        eval_strategy="no",
        eval_on_start=False,
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    processor = demo_processor()
    trainer = TransRecTrainer(
        TransRecModel(demo_config()),
        arguments,
        catalogue=warm,
        split=leave_one_out(warm_sequences),
        processing_class=processor,
    )
    trainer.train()
    served = Recommender(trainer.model, ItemSource(warm, processor))
    served.add_items(catalogue.select(cold))
    assert len(served) == len(catalogue)

    histories, targets = [], []
    for user in range(len(sequences)):
        items = sequences[user]["items"]
        if cold[items[-1]] and (~cold[items[:-1]]).sum() >= 3:
            histories.append(catalogue.item_ids[items[:-1]].tolist())
            targets.append(catalogue.item_ids[items[-1]])
    found = served.recommend(histories, 10)
    hit_rate = np.mean(
        [target in [item.item_id for item in user] for target, user in zip(targets, found, strict=True)]
    )
    chance = 10 / (len(catalogue) - np.mean([len(set(history)) for history in histories]))
    assert len(targets) > 100 and hit_rate > 4 * chance, f"{hit_rate:.3f} against {chance:.3f} by chance"
    print(f"hit_rate@10 of cold items {hit_rate:.3f}, by chance {chance:.3f}, {len(targets)} users")
