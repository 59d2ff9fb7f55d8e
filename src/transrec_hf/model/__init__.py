"""The model and everything that travels with a checkpoint."""

from __future__ import annotations
