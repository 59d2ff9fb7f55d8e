"""A `transformers.Trainer` that writes checkpoints as a whole, and pushes no pickles."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..errors import NotFinite
from ..files import TRAINING_LOCK, locked, written_whole
from ..publishing.checkpoint import remove_old_checkpoints
from ..publishing.hub import PICKLES, upload_checkpoint
from .tuning import thin_checkpoints


class WholeCheckpoints(Trainer):
    """Writes checkpoints as a whole, even if the process is killed, and keeps those with the most steps."""

    _partial: str | None = None  # where a checkpoint is written, before it is moved to its place

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other run can write checkpoints to the output folder. Raises `OSError`."""
        folder = Path(self.args.output_dir)
        if not self.args.should_save:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, TRAINING_LOCK, wait=0, why="another training writes its checkpoints there"):
            yield

    def _get_output_dir(self, trial: Any) -> str:
        return self._partial or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, in all processes, and then move it there."""
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = run_dir / f".{name}.writing"  # the same in all processes
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._partial = str(partial)
            with thin_checkpoints(self.model, self.args):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
                with written_whole(run_dir / name, replaces_all=True) as folder:
                    for path in (partial / name).iterdir():
                        path.rename(folder / path.name)
        except NotFinite:
            raise
        except Exception as error:
            raise OSError(
                f"{run_dir / name} could not be written and was removed ({error}): free disk space, and resume from "
                "the last checkpoint"
            ) from error
        finally:
            self._partial = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_old_checkpoints(run_dir, self.args.save_total_limit, self.state.global_step, best)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and self.args.should_save:
            (Path(output_dir) / f"{FSDP_MODEL_NAME}.bin").unlink()  # a second copy of the weights, as a pickle

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` would push its arguments as a pickle
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pending = self.push_in_progress
        jobs = [] if pending is None or pending.is_done() else pending.jobs
        if jobs and not self.args.hub_always_push:
            return
        self.control: Any = self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output_dir = self.args.output_dir  # the checkpoint itself may be deleted before it is pushed
        left_out = shutil.ignore_patterns(*PICKLES, TRAINER_STATE_NAME)
        with written_whole(output_dir) as partial:
            shutil.copytree(checkpoint_folder, partial, ignore=left_out, dirs_exist_ok=True)
        job = upload_checkpoint(
            output_dir,
            self.hub_model_id,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
        )
        self.push_in_progress: Any = PushInProgress([*jobs, job])
