"""From the items of a catalogue to model inputs and vectors."""

from __future__ import annotations
