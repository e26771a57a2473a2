"""One background thread for what training must not wait for: requests to the daemon and planning.

House rules: jobs run one after another in the sequence they were handed in; nothing raises out of the thread; it ends with the
process. Stepped simulation hands in with ``background=False`` and gets everything done in its own thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """``submit`` answers at once; the future carries the result or the exception."""

    def __init__(self, background: bool) -> None:
        self._background = background
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        if not self._background:
            _do(future, job)
            return future
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="powerd-conductor", daemon=True)
            self._thread.start()
        self._jobs.put((future, job))
        return future

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what was handed in, for so long at most."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(timeout_s)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            _do(*item)


def _do(future: Future[T], job: Callable[[], T]) -> None:
    try:
        future.set_result(job())
    except Exception as error:  # it belongs to whoever asks for the result
        future.set_exception(error)
