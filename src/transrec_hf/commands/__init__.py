"""What the commands and scripts share: options, runs and their reports."""

from __future__ import annotations
