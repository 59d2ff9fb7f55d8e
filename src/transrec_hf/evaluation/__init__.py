"""Ranking the whole catalogue: metrics, protocols, baselines and slices."""

from __future__ import annotations
