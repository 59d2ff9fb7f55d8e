r"""Share the partitions among the processes of Accelerate. The options are those of `partitions.py`.

    accelerate launch --cpu --num_processes 2 examples/distributed/on_accelerate.py \
        encode runs/model catalogue/ vectors/

On several machines: `--num_machines 2 --machine_rank 0 --main_process_ip HEAD`, and folders that they share.
"""

from __future__ import annotations

from accelerate import PartialState
from partitions import parse_arguments, todo


def main() -> None:
    options, kind, arguments = parse_arguments()
    state = PartialState()
    paths = todo(options.inputs, options.output)
    state.wait_for_everyone()  # every process lists them before one writes anything
    mine = paths[state.process_index :: state.num_processes]
    if mine:
        work = kind(*arguments)
        for path in mine:
            print(f"process {state.process_index}: {path}: {work(path):,} rows", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
