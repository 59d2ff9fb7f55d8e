"""Train a model on one platform, evaluate it and save it: `python examples/pretrain.py`.

The command `transrec pretrain` does the same with data of your own, from options or a YAML file.
"""

from __future__ import annotations

from transformers import set_seed

from transrec_hf import TransRecModel, TransRecTrainer, TransRecTrainingArguments, leave_one_out
from transrec_hf.data.demo import demo_config, demo_processor, demo_world


def main() -> None:
    set_seed(0)
    # With your own data: `catalogue, sequences = load_domain("my_source")`
    platform = demo_world().source
    # With pre-trained towers: `TransRecModel.from_text_vision_pretrained(text_model=..., vision_model=...)` and
    # `TransRecProcessor.from_towers(...)`. Pre-trained towers need a smaller learning rate, 1e-4
    model, processor = TransRecModel(demo_config()), demo_processor()
    args = TransRecTrainingArguments(
        "runs/pretrain",
        num_train_epochs=6,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        tower_learning_rate=2e-3,
        warmup_steps=20,
    )
    trainer = TransRecTrainer(
        model,
        args,
        catalogue=platform.catalogue,
        split=leave_one_out(platform.sequences),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    report = trainer.report()
    for name, scores in {"model": report, **report["baselines"]}.items():
        print(f"{name:<14} ndcg@10 {scores['metrics']['ndcg@10']:.3f}")


if __name__ == "__main__":
    main()
