"""Batches, arguments, the trainer, and what a run will cost."""

from __future__ import annotations
