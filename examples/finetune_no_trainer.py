"""What `finetune.py` does, as an explicit loop on Accelerate: to read, and to change.

    python examples/finetune_no_trainer.py                        # what pretrain.py has left, on the demo's target
    python examples/finetune_no_trainer.py --from_checkpoint runs/my_source --data my_target --output_dir runs/loop
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/finetune_no_trainer.py

From one seed its losses are those of the trainer (`tests/test_examples.py`). The trainer adds resuming, trackers,
accumulation, early stopping and more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from transrec_hf import DataCollatorForNextItem, RankingEvaluator
from transrec_hf.commands.options import DataArguments, ModelArguments, SplitArguments, option, parse_arguments, script
from transrec_hf.commands.runs import check_output_dir, prepare_run
from transrec_hf.data.statistics import data_statistics, log_popularity
from transrec_hf.errors import DataError
from transrec_hf.items.encoding import standardize_projections
from transrec_hf.publishing.checkpoint import save_checkpoint
from transrec_hf.training.collator import TrainingWindows
from transrec_hf.training.trainer import parameter_groups


logger = logging.getLogger("transrec_hf.examples")


@dataclass
class LoopArguments:
    output_dir: str = option("runs/finetune_no_trainer", "Folder of the best model.")
    seed: int = option(42, "Seed of new weights, batches, dropout and negatives.")
    num_train_epochs: int = option(10, "Passes over the training sequences.")
    train_batch_size: int = option(128, "Users per process and step.")
    eval_batch_size: int = option(256, "Items encoded at once.")
    learning_rate: float = option(1e-3, "Peak learning rate of the user encoder.")
    weight_decay: float = option(0.0, "Weight decay of the user encoder.")
    tower_learning_rate: float = option(1e-4, "Peak learning rate of the towers.")
    tower_weight_decay: float = option(0.0, "Weight decay of the towers.")
    projection_learning_rate: float | None = option(None, "The same of pooling, projections and fusion.")
    projection_weight_decay: float | None = option(None, "The same of pooling, projections and fusion.")
    warmup_steps: int = option(0, "Steps in which the rates rise to their peaks.")
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to.")
    trainable_blocks: int | None = option(None, "Blocks trained at the top of each tower [all].")
    mixed_precision: str = option("no", "Precision of the forward pass.", choices=("no", "bf16"))


@script
def main(argv: Sequence[str] | None = None) -> list[float]:
    options = (ModelArguments, DataArguments, SplitArguments, LoopArguments)
    defaults = {"from_checkpoint": "runs/pretrain", "data": "demo:target"}
    model_args, data_args, split_args, args = parse_arguments(options, argv, __doc__, **defaults)
    check_output_dir(args.output_dir)
    # the seedable sampler shuffles each epoch by seed + epoch, alike on all processes
    sampling = DataLoaderConfiguration(use_seedable_sampler=True)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=args.mixed_precision, dataloader_config=sampling)
    if accelerator.distributed_type == "FSDP":
        raise DataError("this loop keeps the whole model on each GPU: use finetune.py to shard it")

    # Data and model
    with accelerator.main_process_first():
        catalogue, split, model, processor = prepare_run(model_args, data_args, split_args, args.seed)
    model.freeze_towers(args.trainable_blocks)
    if processor is not None:
        standardize_projections(model, catalogue, processor, seed=args.seed)  # of towers that are new to the task
    train_counts = split.train.item_counts(len(catalogue))
    windows = TrainingWindows(split.train, model.config.max_position_embeddings, model.config.num_targets)
    collator = DataCollatorForNextItem(catalogue, processor, model.config, log_popularity(train_counts), args.seed)
    set_seed(args.seed)
    loader = DataLoader(windows, args.train_batch_size, shuffle=True, collate_fn=collator)

    # A learning rate for each part of the model, and no decay of biases and norms
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    optimizer = torch.optim.AdamW(parameter_groups(model, args, decayed), fused=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    num_steps = len(loader) * args.num_train_epochs
    scheduler = get_linear_schedule_with_warmup(optimizer, args.warmup_steps, num_steps)

    evaluator = RankingEvaluator(
        catalogue,
        split.validation,
        processor,
        protocol=split_args.protocol,
        train_counts=train_counts,
        batch_size=args.eval_batch_size,
    )
    losses, best = [], -1.0
    progress = tqdm(total=num_steps, desc="Training", unit="step", disable=not accelerator.is_main_process)
    for epoch in range(args.num_train_epochs):
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
            progress.set_postfix(loss=f"{losses[-1]:.3f}")

        unwrapped = accelerator.unwrap_model(model)
        with accelerator.autocast():
            metrics = evaluator(unwrapped, accelerator)
        logger.info("Epoch %d: ndcg@10 %.4f, hit_rate@10 %.4f", epoch, metrics["ndcg@10"], metrics["hit_rate@10"])
        if metrics["ndcg@10"] > best:
            best = metrics["ndcg@10"]
            if accelerator.is_main_process:
                save_checkpoint(args.output_dir, unwrapped, processor, data_statistics(catalogue, split))
    progress.close()
    return losses


if __name__ == "__main__":
    main()
