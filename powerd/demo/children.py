"""Processes of the demonstration: started with a parent's eye on them, read line by line, ended by their pid.

House rules: a child dies with this process even if that is killed; whoever does not end when asked is killed; what a child says
on stderr is kept for the error message.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_INTERRUPTS = {signal.SIGINT, signal.SIGTERM}
_libc = ctypes.CDLL(None)


class DemoError(RuntimeError):
    """The demonstration cannot go on; the message says which process failed and what it said last."""


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)


@contextlib.contextmanager
def _not_interrupted() -> Iterator[None]:
    """Keep interruptions for afterwards: raised in what Python runs around a fork, they would be ignored."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child:
    """One process whose stdout is JSON, a line a message."""

    def __init__(self, name: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as errors, _not_interrupted():
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                process_group=0, text=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (two system calls, no lock)
            )  # fmt: skip
        self.messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"demo-{name}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def _read(self) -> None:
        stream = self.process.stdout
        for line in stream if stream is not None else ():
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    self.messages.put(message)
        self.messages.put(None)

    def next(self, timeout_s: float) -> dict[str, Any]:
        """The next message; DemoError when the child ends or says nothing for so long."""
        try:
            message = self.messages.get(timeout=timeout_s)
        except queue.Empty:
            raise DemoError(f"{self.name} has said nothing for {timeout_s:g} s: {self.last_words()}") from None
        if message is None:
            raise DemoError(f"{self.name} ended unexpectedly: {self.last_words()}")
        return message

    def waiting(self) -> Iterator[dict[str, Any]]:
        """Messages that are there already."""
        while True:
            try:
                message = self.messages.get_nowait()
            except queue.Empty:
                return
            if message is not None:
                yield message

    def tell(self, line: str) -> None:
        """Send it a line."""
        if self.process.stdin is not None:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            if lines:
                return " | ".join(lines[-3:])
        return "no word on stderr"

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, patience_s: float = 8.0) -> None:
        """Ask it to end, then make sure; harmless when it has ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()


def say(**message: object) -> None:
    """What a child writes: one JSON object on a line of its own, at once."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
