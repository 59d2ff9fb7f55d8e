"""Batches of the requests of many clients: a bounded queue in front of one thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Busy(Exception):
    """Too many requests are waiting."""


class Lane:
    """
    A queue of jobs and the thread that computes them. Jobs that arrive while the thread is busy are computed together
    afterwards. So batches grow with the load, and no job waits for a batch to fill.

    Args:
        compute (`Callable`): Returns a result for each of several jobs, or the exception of the job.
        max_waiting (`int`): Number of jobs that may wait; further ones are refused.
        max_batch (`int`): Most jobs that are computed together.
        observe (`Callable`, *optional*): Called with the size of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        max_waiting: int,
        max_batch: int,
        observe: Callable[[int], object] = lambda size: None,
    ):
        self.compute, self.max_waiting, self.max_batch, self.observe = compute, max_waiting, max_batch, observe
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transrec-lane")
        self._task: asyncio.Task | None = None
        self._tasks: asyncio.Event

    def start(self) -> None:
        """Start the computing; call it in the event loop."""
        self._tasks = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop after the current batch; waiting jobs are cancelled."""
        if self._task is not None:
            self._task.cancel()
        for _, answer in self._waiting:
            answer.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def __len__(self) -> int:
        return len(self._waiting)

    def is_full(self) -> bool:
        """Whether another job would be refused."""
        return len(self._waiting) >= self.max_waiting

    async def submit(self, job: Any, timeout: float) -> Any:
        """
        The result of a job.

        Raises:
            [`Busy`]: If too many jobs are waiting.
            `TimeoutError`: If the job took longer than `timeout` seconds. If it is still waiting, it is not computed.
        """
        if self.is_full():
            raise Busy
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        self._waiting.append((job, answer))
        self._tasks.set()
        try:
            return await asyncio.wait_for(answer, timeout)
        except (asyncio.TimeoutError, asyncio.CancelledError):  # of a client that is gone, too
            self._waiting = deque(pair for pair in self._waiting if pair[1] is not answer)
            raise

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._tasks.wait()
            batch: list[tuple[Any, asyncio.Future]] = []
            while self._waiting and len(batch) < self.max_batch:
                batch.append(self._waiting.popleft())
            if not self._waiting:
                self._tasks.clear()
            if not batch:
                continue
            self.observe(len(batch))
            try:
                results = await loop.run_in_executor(self._thread, self.compute, [job for job, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, answer), result in zip(batch, results, strict=True):
                if answer.done():
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)


def one_by_one(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The result of each job, or the exception that it raised."""
    results: list[Any] = []
    for job in jobs:
        try:
            results.append(job())
        except Exception as error:
            results.append(error)
    return results
