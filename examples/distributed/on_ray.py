"""The partitions on the workers of Ray Data, here two on this machine: the options are those of `partitions.py`.

    pip install 'ray[data]'
    python examples/distributed/on_ray.py encode runs/model catalogue/ vectors/ --workers 2

On a cluster that is there, `RAY_ADDRESS=ray://head:10001` is all; the folders have to be shared by its machines.
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
        """One model a worker, made once."""

        def __init__(self) -> None:
            self.work = kind(*arguments)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"path": batch["path"], "rows": [self.work(str(path)) for path in batch["path"]]}

    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(num_cpus=options.workers, include_dashboard=False, object_store_memory=2**28)
    # a block for each partition, or one actor gets them all; half a CPU an actor, or none is left for reading, and
    # everything waits for ever. On GPUs: num_gpus=1 instead
    data = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    done = data.map_batches(Actor, batch_size=1, concurrency=options.workers, num_cpus=0.5)
    for row in done.iter_rows():
        print(f"{row['path']}: {row['rows']:,} rows", flush=True)


if __name__ == "__main__":
    main()
