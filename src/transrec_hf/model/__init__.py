"""The model, and all other code that is saved with a checkpoint."""

from __future__ import annotations
