"""Share the partitions among the workers of Ray Data, here two on this machine. The options are those of
`partitions.py`.

    pip install 'ray[data]'
    python examples/distributed/on_ray.py encode runs/model catalogue/ vectors/ --workers 2

To use a running cluster, set `RAY_ADDRESS=ray://head:10001`. All its machines must see the same folders.
"""

from __future__ import annotations

import os
from typing import Any

from partitions import parse_arguments, todo


def main() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options, kind, arguments = parse_arguments()
    paths = todo(options.inputs, options.output)
    if not paths:
        return

    class Actor:
        """Holds the model of one worker, which is loaded once."""

        def __init__(self) -> None:
            self.work = kind(*arguments)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"path": batch["path"], "rows": [self.work(str(path)) for path in batch["path"]]}

    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(num_cpus=options.workers, include_dashboard=False, object_store_memory=2**28)
    # Each partition is a block, or one actor would get them all. Each actor takes half a CPU: with a whole one no CPU
    # would be left for reading, and everything would wait for ever. On GPUs write num_gpus=1 instead.
    data = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    done = data.map_batches(Actor, batch_size=1, concurrency=options.workers, num_cpus=0.5)
    for row in done.iter_rows():
        print(f"{row['path']}: {row['rows']:,} rows", flush=True)


if __name__ == "__main__":
    main()
