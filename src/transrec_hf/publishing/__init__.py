"""Checkpoints, cards, results and data sets, in folders and on the Hub."""

from __future__ import annotations
