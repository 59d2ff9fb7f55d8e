"""`transrec serve`: recommendations over HTTP."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..errors import DataError
from ..serving.recommender import Recommender
from .index import APPROXIMATE, open_recommender
from .options import DataArguments, option
from .parsing import parse_arguments


logger = logging.get_logger(__name__)

TOKEN = "TRANSREC_TOKEN"


@dataclass
class ServiceArguments:
    """What the service serves, where it listens, and its limits."""

    _argument_group_name = "service"
    checkpoint: str | None = option(None, "Folder or Hub id of a TransRec model.")
    index: str | None = option(None, "Folder in which the item vectors and changes to the items are kept.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on.")
    workers: int = option(1, "Number of processes; more than one need --index, whose file they share.")
    token_file: str | None = option(
        None, f"File with the token that clients have to send [the variable {TOKEN}, or no token]."
    )
    allow_anonymous: bool = option(False, "Serve other machines without a token.")
    read_only: bool = option(False, "Refuse changes to the items.")
    load_towers: bool = option(False, "Load the towers at the start [at the first request with contents].")
    approximate: float | None = option(None, APPROXIMATE)
    timeout: float = option(10.0, "Seconds after which a request fails.")
    max_waiting: int = option(256, "Number of requests that may wait; further ones get status 503.")
    max_megabytes: int = option(16, "Largest size of a request, in MB.")
    use_cpu: bool = option(False, "Compute on the CPU, even if there is a GPU.")

    def __post_init__(self) -> None:
        if min(self.workers, self.max_waiting, self.max_megabytes) < 1 or self.timeout <= 0:
            raise ValueError("workers, max_waiting and max_megabytes must be 1 or more, and timeout above 0")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if self.workers > 1 and not self.index:
            raise ValueError("several workers share the items through the folder of an index: give --index")

    def token(self) -> str | None:
        """The token, from the file or the environment. Raises [`DataError`]."""
        if self.token_file is None:
            token = os.environ.get(TOKEN, "")
        else:
            try:
                token = Path(self.token_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{self.token_file}: the token cannot be read. Check the path and its permissions."
                ) from error
        if self.token_file is not None and not token:
            raise DataError(f"{self.token_file}: the file is empty. Write the token into it.")
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise DataError(
                "the token has characters that an HTTP header cannot hold: use ASCII letters, digits and punctuation"
            )
        return token or None


def serve(argv: Sequence[str] | None = None) -> None:
    """
    Serve recommendations over HTTP.

        transrec serve runs/my_target --data my_target --index runs/index
        transrec serve runs/my_target --index runs/index --workers 2 --read_only
        TRANSREC_TOKEN=$(openssl rand -hex 32) transrec serve runs/my_target --index runs/index --host 0.0.0.0

    GET /openapi.json describes the routes. The service answers this machine only, unless --host says otherwise. With
    --index, changes to the items are kept when the process ends.
    """
    data_args, args = parse_arguments((DataArguments, ServiceArguments), argv, serve, positional="checkpoint")
    require("fastapi", "uvicorn", "prometheus_client", extra="serve")
    token = args.token()
    if token is None and not args.allow_anonymous and not is_loopback(args.host):
        raise DataError(
            f"{args.host} can be reached by other machines: give a token in {TOKEN} or --token_file, or add "
            "--allow_anonymous"
        )
    with nullcontext() if args.workers == 1 else tempfile.TemporaryDirectory(prefix="transrec-serve-") as shared:
        cells = shared and os.path.join(shared, "cells.faiss")
        recommender = load_recommender(args.checkpoint, data_args, args.index, args.use_cpu, args.approximate, cells)
        logger.info("Serving %s items at http://%s:%s", f"{len(recommender):,}", args.host, args.port)
        if shared is None:
            return run_alone(recommender, data_args, args, token)
        device = str(recommender.device)  # of a model without its towers some weights are on "meta"
        del recommender
        run_workers(data_args, args, token, device, shared, cells)


def require(*libraries: str, extra: str) -> None:
    """Raises [`DataError`] if one of the libraries of an extra is missing."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise DataError(f"{library} is not installed: pip install 'transrec-hf[{extra}]'")


def load_recommender(
    checkpoint: str | None,
    data_args: DataArguments,
    index: str | None,
    use_cpu: bool = False,
    approximate: float | None = None,
    cells: str | None = None,
) -> Recommender:
    """A model and its items, with their popularity if the interactions are given. Raises [`DataError`]."""
    catalogue = counts = None
    if checkpoint and (data_args.data or data_args.interactions):
        catalogue, sequences = data_args.load()
        counts = dict(zip(catalogue.item_ids.tolist(), sequences.item_counts(len(catalogue)).tolist(), strict=True))
    elif checkpoint and data_args.items:
        catalogue = data_args.load_items()
    return open_recommender(checkpoint, catalogue, index, use_cpu, approximate, cells, counts=counts)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def limits(data_args: DataArguments, args: ServiceArguments) -> dict:
    """The fields of [`Settings`] that the options give, without the token."""
    places = (args.checkpoint, args.index, data_args.data, data_args.items, data_args.interactions)
    folders = [form for place in places if place for form in (place, os.path.abspath(place))]
    return {
        "read_only": args.read_only,
        "load_towers": args.load_towers,
        "timeout": args.timeout,
        "max_waiting": args.max_waiting,
        "max_body": args.max_megabytes * 2**20,
        "secrets": tuple(folder for folder in folders if os.sep in folder),
    }


def how_to_listen(args: ServiceArguments) -> dict:
    """Arguments of `uvicorn.run`."""
    return {
        "host": args.host,
        "port": args.port,
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "ws": "none",
        "lifespan": "on",
        "limit_concurrency": 4 * args.max_waiting,
        "timeout_graceful_shutdown": max(1, int(np.ceil(args.timeout))),
        "timeout_worker_healthcheck": 120,  # the default of 5 seconds kills workers that load a model
    }


def run_alone(recommender: Recommender, data_args: DataArguments, args: ServiceArguments, token: str | None) -> None:
    """Serve in this process."""
    import uvicorn

    from ..serving.service import Settings, create_app

    uvicorn.run(create_app(recommender, Settings(token=token, **limits(data_args, args))), **how_to_listen(args))


def run_workers(
    data_args: DataArguments, args: ServiceArguments, token: str | None, device: str, shared: str, cells: str | None
) -> None:
    """Serve in several processes, which map the same files (the index and its cells) into their memory."""
    import uvicorn

    threads = max(1, (os.cpu_count() or 1) // args.workers)
    places: dict = {name: getattr(args, name) for name in ("checkpoint", "index", "approximate")}
    places |= {"device": device, "threads": min(threads, torch.get_num_threads()), "cells": cells}
    counters = os.path.join(shared, "metrics")
    os.mkdir(counters)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = counters
    os.environ["TRANSREC_SERVE"] = json.dumps({"settings": limits(data_args, args), "places": places})
    if token is not None:
        os.environ[TOKEN] = token
    factory = "transrec_hf.serving.service:app_of_worker"
    uvicorn.run(factory, factory=True, workers=args.workers, **how_to_listen(args))
