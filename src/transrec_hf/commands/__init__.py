"""The verbs of `transrec` that do the work: their options, and one function for each."""

from __future__ import annotations
