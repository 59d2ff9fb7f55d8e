"""Checkpoints to the Hub."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import HfApi


PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
"""Formats that run code when they are read: none of them is ever pushed."""
NOT_PUSHED = (*PICKLES, "_*", ".*", "checkpoint-*")


def upload_checkpoint(folder: str | os.PathLike, repo_id: str, **kwargs: Any) -> Any:
    """
    Push a folder with a checkpoint (model, processor, statistics, card, index) in one commit.

    Hidden files, the checkpoints of a training run, and pickles such as the state of an optimizer stay behind.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        repo_id (`str`): an existing repository.
        kwargs: further arguments of [`~huggingface_hub.HfApi.upload_folder`]: `token`, `revision`, `commit_message`,
            `create_pr`, `path_in_repo`, `run_as_future`.
    """
    return HfApi().upload_folder(folder_path=str(folder), repo_id=repo_id, ignore_patterns=list(NOT_PUSHED), **kwargs)
