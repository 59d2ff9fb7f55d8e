"""Batches, arguments, the trainer, and the planning of runs."""

from __future__ import annotations
