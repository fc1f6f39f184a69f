"""Threads for transfers that needn't be joined once the transfer was stopped."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_datasphere.client.http.errors import StoppedError
from airflow_provider_datasphere.client.http.exchange import STOP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from airflow_provider_datasphere.client.http.exchange import Stop

_Result = TypeVar("_Result")

#: How long leaving the pool waits for threads that still work.
JOIN_SECONDS = 1.0


class Workers:
    """A pool of daemon threads; a context manager.

    Unlike a ``ThreadPoolExecutor`` it can be left, by an exception, while a thread is blocked in a call that can't be
    cancelled, such as a DNS query or an object store's client. Such a thread delays neither the task nor the exit of
    its process.

    :param count: limit of threads.
    :param name: prefix of the threads' names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads: list[Thread] = []
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def submit(self, work: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Call ``work(*args)`` in one of the threads."""
        future: Future[_Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(*args)
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)

        self._queue.put(run)
        if len(self._threads) < self._count:
            thread = Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return future

    def _work(self) -> None:
        while run := self._queue.get():
            run()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            pass
        for _thread in self._threads:
            self._queue.put(None)
        until = time.monotonic() + JOIN_SECONDS
        for running in self._threads:
            running.join(max(0.0, until - time.monotonic()))


def wait_for(
    futures: Collection[Future[_Result]], seconds: float, stop: Stop
) -> tuple[set[Future[_Result]], set[Future[_Result]]]:
    """Wait until all are done, one has failed, or ``seconds`` have passed; return those that are done, and the others.

    :raises StoppedError: it was stopped.
    """
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        done, pending = wait(futures, timeout=max(0.0, min(left, STOP_SECONDS)), return_when=FIRST_EXCEPTION)
        if not pending or left <= 0 or any(future.exception() for future in done):
            return done, pending
        if stop.is_set():
            raise StoppedError("the transfer was stopped")
