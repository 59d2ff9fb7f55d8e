"""How a peer talks to the benchmark that started it: a line of JSON comes in, a line of JSON goes out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answers each request on standard input with `answer(**request)`, until there are no more."""
    replies, sys.stdout = sys.stdout, sys.stderr  # anything else that the peer prints is no reply
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)
