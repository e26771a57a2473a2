"""How ranks speak to each other: one Unix datagram socket per rank, every message known to the node's clock.

House rules: a message is counted in flight by its sender and taken off by its receiver after everybody who may wait for it is
registered as running, so that stepped time stands still while it travels; a rank that waits does so on the clock, holding nobody.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from powerd.clock import NEVER_NS, Clock, Waiter

START_S = 60.0  # real, for all ranks to open their boxes
_LOOK_S = 0.01
_BUFFER = 1 << 20  # the kernel cuts it to what it allows
Key = tuple[str, ...]


class MailError(RuntimeError):
    """A rank cannot be reached; the message says which."""


class Mail:
    """The box of one rank and the way to all others; the calling thread takes part in the clock from here on."""

    def __init__(self, folder: Path, rank: int, world: int, clock: Clock) -> None:
        self.rank, self.world = rank, world
        self._folder, self._clock = folder, clock
        self._box: dict[tuple[int, Key], Any] = {}
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._waiters: list[Waiter] = []
        self._waiter()  # before there is a box: whoever sees all boxes knows that all ranks take part
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._socket.bind(str(self._path(rank)))
        threading.Thread(target=self._receive, name="mail", daemon=True).start()

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank}.box"

    def _waiter(self) -> Waiter:
        found: Waiter | None = getattr(self._mine, "waiter", None)
        if found is None:
            found = self._mine.waiter = self._clock.waiter(f"rank {self.rank}")
            with self._lock:
                self._waiters.append(found)
        return found

    def meet(self) -> None:
        """Return when every rank has its box; MailError when one does not come. Nothing moves in stepped time meanwhile."""
        limit_s = time.monotonic() + START_S
        while missing := [rank for rank in range(self.world) if not self._path(rank).exists()]:
            if time.monotonic() > limit_s:
                raise MailError(f"rank {missing[0]} did not start within {START_S:g} s")
            time.sleep(_LOOK_S)

    def send(self, rank: int, key: Key, value: object = None) -> None:
        """Put a message into another rank's box (or one's own); MailError when nobody is there."""
        if rank == self.rank:
            with self._lock:
                self._box[rank, key] = value
            return
        data = json.dumps([self.rank, key, value], separators=(",", ":")).encode()
        self._clock.flight(1)
        try:
            self._socket.sendto(data, str(self._path(rank)))
        except OSError as error:
            self._clock.flight(-1)
            raise MailError(f"rank {rank} cannot be reached: {error.strerror or error}") from None

    def _receive(self) -> None:
        while True:
            data = self._socket.recv(_BUFFER)
            sender, key, value = json.loads(data)
            with self._lock:
                self._box[sender, tuple(key)] = value
                waiters = list(self._waiters)
            for waiter in waiters:
                waiter.wake()
            self._clock.flight(-1)

    def take(self, rank: int, key: Key, waiting: Callable[[], None] | None = None) -> Any:
        """The value of the message with this key from this rank; ``waiting`` is called once if it is not there yet."""
        while True:
            with self._lock:
                if (rank, key) in self._box:
                    return self._box.pop((rank, key))
            if waiting is not None:
                waiting()
                waiting = None
                continue  # it may have come meanwhile
            self._waiter().wait_until(NEVER_NS)

    def gather(self, key: Key, value: object = None, waiting: Callable[[], None] | None = None) -> list[Any]:
        """Every rank's value, by rank; returns when all have told theirs, so it is a barrier, too."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        for rank in others:
            self.send(rank, key, value)
        found = {rank: self.take(rank, key, waiting) for rank in others}
        # By way of JSON, as the others have it.
        return [found[rank] if rank != self.rank else json.loads(json.dumps(value)) for rank in range(self.world)]

    def share(self, key: Key, source: int, value: object = None, waiting: Callable[[], None] | None = None) -> Any:
        """The value that rank ``source`` tells everybody."""
        if self.rank != source:
            return self.take(source, key, waiting)
        for rank in range(self.world):
            if rank != source:
                self.send(rank, key, value)
        return value

    def close(self) -> None:
        """Leave the clock and take the box away."""
        with self._lock:
            waiters, self._waiters = self._waiters, []
        _close_all(waiters)
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink()


def _close_all(waiters: Iterable[Waiter]) -> None:
    for waiter in waiters:
        waiter.close()
