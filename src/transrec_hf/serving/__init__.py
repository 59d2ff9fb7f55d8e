"""Recommendations from a trained model."""

from __future__ import annotations
