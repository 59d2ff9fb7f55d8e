"""Do what `finetune.py` does in an explicit training loop with Accelerate, which you can read and change.

    python examples/finetune_no_trainer.py                        # the model of pretrain.py, on the demo's target
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/finetune_no_trainer.py

With the same seed its losses equal those of the trainer (`tests/test_examples.py`). The trainer can do more: it
resumes runs, reports to trackers, accumulates gradients and stops early. It also runs under FSDP; this loop does not.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from transrec_hf import (
    Catalogue,
    DataCollatorForNextItem,
    ItemSource,
    RankingEvaluator,
    Split,
    TransRecModel,
    TransRecProcessor,
    TransRecTrainingArguments,
    leave_one_out,
)
from transrec_hf.data.demo import demo_world
from transrec_hf.data.statistics import log_popularity
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.training.collator import TrainingWindows
from transrec_hf.training.parameters import parameter_groups


def train(
    model: TransRecModel,
    processor: TransRecProcessor,
    catalogue: Catalogue,
    split: Split,
    args: TransRecTrainingArguments,
) -> list[float]:
    """Returns the losses of all steps. The best model by validation is saved in `args.output_dir`."""
    # The seedable sampler shuffles each epoch by seed + epoch, in the same way on all processes
    sampling = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(
        cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "no", dataloader_config=sampling
    )
    model.freeze_towers(args.trainable_blocks)
    source = ItemSource(catalogue, processor)
    standardize_projections(model, source, seed=args.seed)  # those of new towers
    train_counts = split.train.item_counts(len(catalogue))
    windows = TrainingWindows(split.train, model.config.max_position_embeddings, model.config.num_targets)
    collator = DataCollatorForNextItem(source, model.config, log_popularity(train_counts), args.seed)
    set_seed(args.seed)
    loader = DataLoader(windows, args.per_device_train_batch_size, shuffle=True, collate_fn=collator)

    # A learning rate for each part of the model, and no decay of biases and norms
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    optimizer = torch.optim.AdamW(parameter_groups(model, args, decayed), fused=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    epochs = int(args.num_train_epochs)
    num_steps = len(loader) * epochs
    scheduler = get_linear_schedule_with_warmup(optimizer, int(args.warmup_steps), num_steps)

    evaluator = RankingEvaluator(source, split.validation, train_counts=train_counts)
    losses, best = [], -1.0
    progress = tqdm(total=num_steps, desc="Training", unit="step", disable=not accelerator.is_main_process)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        windows.set_epoch(epoch)  # new negatives
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            progress.update()

        unwrapped = accelerator.unwrap_model(model)
        with accelerator.autocast():
            metrics = evaluator(unwrapped, accelerator)
        progress.set_postfix(loss=f"{losses[-1]:.3f}", ndcg=f"{metrics['ndcg@10']:.3f}")
        if metrics["ndcg@10"] > best:
            best = metrics["ndcg@10"]
            if accelerator.is_main_process:
                unwrapped.save_pretrained(args.output_dir)
                processor.save_pretrained(args.output_dir)
    progress.close()
    return losses


def main() -> None:
    args = TransRecTrainingArguments("runs/finetune_no_trainer", per_device_train_batch_size=32, learning_rate=5e-4)
    platform = demo_world().target
    model = TransRecModel.from_pretrained("runs/pretrain")
    processor = TransRecProcessor.from_pretrained("runs/pretrain")
    train(model, processor, platform.catalogue, leave_one_out(platform.sequences), args)


if __name__ == "__main__":
    main()
