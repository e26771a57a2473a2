"""Starts and ends engines on this machine's GPUs: any command that serves OpenAI's paths and /health on a port.

House rules: a GPU belongs to one replica at a time; an engine that does not end when asked is killed, and only by its own
pid; nothing here decides when.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Protocol

#: Production. vLLM aborts what is in flight on SIGTERM unless told how long it may take.
VLLM: Final = (
    "vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--tensor-parallel-size", "{tp}",
    "--shutdown-timeout", "{drain_s}", "--max-num-batched-tokens", "{chunk_tokens}",
)  # fmt: skip
#: The simulated engine, on a simulated node.
SIMULATED: Final = (
    sys.executable, "-m", "powerd.main", "sim", "engine", "--port", "{port}", "--tp", "{tp}", "--gpus", "{gpus}",
    "--model", "{model}", "--shutdown-timeout", "{drain_s}", "--chunk-tokens", "{chunk_tokens}",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class NoGpusError(RuntimeError):
    """There are not enough free GPUs; the message says how many there are."""


@dataclass(frozen=True, slots=True)
class Handle:
    """A started engine."""

    id: str
    url: str
    gpus: tuple[str, ...]
    pid: int | None = None

    @property
    def metrics_url(self) -> str:
        """Where its metrics are."""
        return f"{self.url}/metrics"


class Launcher(Protocol):
    """Whoever can start and end engines."""

    def free(self) -> int:
        """How many GPUs nobody has."""

    async def start(self, id_: str, tp: int) -> Handle:
        """Start an engine and return at once, not when it is healthy; NoGpusError, OSError."""

    async def ended(self, handle: Handle) -> str:
        """Return when the engine has ended by itself or otherwise, and say how."""

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        """Ask it to end, make sure after ``timeout_s``, and return when it has ended; harmless when it has."""


@dataclass
class CommandLauncher:
    """Engines as child processes; ``{port}``, ``{tp}``, ``{gpus}``, ``{model}``, ``{drain_s}``, ``{chunk_tokens}``, ``{id}`` are
    filled in.

    ``gpus`` are what ``CUDA_VISIBLE_DEVICES`` understands. A block of neighbours is taken where one is free.
    """

    gpus: Sequence[str]
    model: str
    command: Sequence[str] = VLLM
    drain_s: float = 600.0
    chunk_tokens: int = 512  # prompt tokens of one iteration; give Router and ReplicaClocks the same
    env: Mapping[str, str] = field(default_factory=dict)
    logs: Path | None = None  # a file per engine; else its output is dropped
    host: str = "127.0.0.1"
    _taken: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False)
    _running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict, init=False)

    def free(self) -> int:
        return len(self.gpus) - sum(len(taken) for taken in self._taken.values())

    async def start(self, id_: str, tp: int) -> Handle:
        gpus = self._take(id_, tp)
        try:
            port = _free_port(self.host)
            values = {
                "port": port,
                "tp": tp,
                "gpus": ",".join(gpus),
                "model": self.model,
                "drain_s": f"{self.drain_s:g}",
                "chunk_tokens": self.chunk_tokens,
                "id": id_,
            }
            words = [word.format(**values) for word in self.command]
            env = {**os.environ, **self.env, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            with _log(self.logs, id_) as output:
                process = await asyncio.create_subprocess_exec(
                    *words, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
                    preexec_fn=_die_with_parent,  # one system call, no lock, no allocation
                )  # fmt: skip
        except BaseException:
            del self._taken[id_]
            raise
        self._running[id_] = process
        return Handle(id_, f"http://{self.host}:{port}", gpus, process.pid)

    async def ended(self, handle: Handle) -> str:
        process = self._running.get(handle.id)
        if process is None:
            return "it was never started"
        code = await process.wait()
        _end_group(process.pid)
        self._taken.pop(handle.id, None)
        self._running.pop(handle.id, None)
        return f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        process = self._running.get(handle.id)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            _end_group(process.pid)
            await process.wait()
        _end_group(process.pid)
        self._taken.pop(handle.id, None)
        self._running.pop(handle.id, None)

    def _take(self, id_: str, tp: int) -> tuple[str, ...]:
        used = {gpu for taken in self._taken.values() for gpu in taken}
        free = [gpu for gpu in self.gpus if gpu not in used]
        if len(free) < tp:
            raise NoGpusError(f"{tp} GPUs are needed, {len(free)} are free")
        blocks = [tuple(self.gpus[at : at + tp]) for at in range(0, len(self.gpus) - tp + 1, tp)]
        found = next((block for block in blocks if used.isdisjoint(block)), tuple(free[:tp]))
        self._taken[id_] = found
        return found


def _end_group(group: int) -> None:
    """Kill an engine's workers: they are in the group that was made for it, and nobody else is.

    vLLM's outlive it, and keep the GPUs' memory, when it or its core is killed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _log(folder: Path | None, id_: str) -> Iterator[int | BinaryIO]:
    if folder is None:
        yield asyncio.subprocess.DEVNULL
    else:
        with (folder / f"{id_}.log").open("ab") as file:
            yield file


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
