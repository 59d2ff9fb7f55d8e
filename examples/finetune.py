"""Train the model of `pretrain.py` further, on a platform with other users and items: `python examples/finetune.py`.

The command `transrec finetune` does the same with data of your own, from options or a YAML file.
"""

from __future__ import annotations

from transrec_hf import (
    TransRecModel,
    TransRecProcessor,
    TransRecTrainer,
    TransRecTrainingArguments,
    leave_one_out,
)
from transrec_hf.data.demo import demo_world


def main() -> None:
    platform = demo_world().target
    model = TransRecModel.from_pretrained("runs/pretrain")
    processor = TransRecProcessor.from_pretrained("runs/pretrain")
    args = TransRecTrainingArguments(
        "runs/finetune",
        num_train_epochs=50,
        early_stopping_patience=10,
        per_device_train_batch_size=32,
        learning_rate=5e-4,
        tower_learning_rate=5e-4,
        warmup_steps=20,
    )
    trainer = TransRecTrainer(
        model,
        args,
        catalogue=platform.catalogue,
        split=leave_one_out(platform.sequences),
        processing_class=processor,
    )
    zero_shot = trainer.report(baselines=False)
    trainer.train()
    trainer.save_model()
    report = trainer.report()
    for name, scores in {"zero-shot": zero_shot, "fine-tuned": report, **report["baselines"]}.items():
        low, high = scores["intervals"]["ndcg@10"]
        print(f"{name:<14} ndcg@10 {scores['metrics']['ndcg@10']:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
