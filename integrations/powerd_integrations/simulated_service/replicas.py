"""Starts engines in this process, on GPUs of the simulated node, behind HTTP servers of their own.

House rules: a GPU belongs to one replica; a replica that starts holds its GPUs and draws what an idle context draws; nothing
listens before it is ready, as with vLLM.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field

from powerd.sim.engine import Engine, Options, SimulatedGpus
from powerd.sim.engine.server import Server
from powerd.sim.node import SimNode
from powerd_integrations.fleet.launcher import Handle, NoGpusError
from powerd_policies.dynamollm.engine_model import EngineModel
from powerd_policies.dynamollm.fleet import InstanceLoad


@dataclass
class _Running:
    gpus: tuple[int, ...]
    task: asyncio.Task[None]
    engine: Engine | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    drain_s: float = 0.0


@dataclass
class InProcess:
    """A Launcher (``powerd_integrations.fleet.launcher``) of engines that take ``start_s`` simulated seconds to start."""

    node: SimNode
    model: EngineModel
    start_s: float
    chunk_tokens: int = 512
    stream_interval: int = 16
    _running: dict[str, _Running] = field(default_factory=dict, init=False)

    def free(self) -> int:
        return self.node.gpus - sum(len(r.gpus) for r in self._running.values())

    async def start(self, id_: str, tp: int) -> Handle:
        used = {gpu for running in self._running.values() for gpu in running.gpus}
        blocks = [tuple(range(at, at + tp)) for at in range(0, self.node.gpus - tp + 1, tp)]
        gpus = next((block for block in blocks if used.isdisjoint(block)), None)
        if gpus is None:
            raise NoGpusError(f"{tp} neighbouring GPUs are needed, {self.free()} are free")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        hardware = SimulatedGpus(self.node, gpus, name=id_)
        task = asyncio.get_running_loop().create_task(self._serve(id_, hardware, tp, port), name=id_)
        self._running[id_] = _Running(gpus, task)
        return Handle(id_, f"http://127.0.0.1:{port}", tuple(map(str, gpus)))

    async def _serve(self, id_: str, hardware: SimulatedGpus, tp: int, port: int) -> None:
        running = self._running[id_]
        try:
            if self.start_s:
                await asyncio.wait((asyncio.ensure_future(running.stop.wait()),), timeout=self.start_s)
            if running.stop.is_set():
                hardware.close()
                return
            options = Options(self.model, tp, chunk_tokens=self.chunk_tokens, keep_gaps=True, by_priority=True)
            async with Engine(options, hardware) as engine:
                running.engine = engine
                async with Server(engine, port=port, stream_interval=self.stream_interval):
                    await running.stop.wait()
                    await engine.drain(running.drain_s)
        finally:
            del self._running[id_]

    async def ended(self, handle: Handle) -> str:
        running = self._running.get(handle.id)
        if running is not None:
            await asyncio.wait((running.task,))
            if not running.task.cancelled() and (error := running.task.exception()) is not None:
                return f"failed: {error}"
        return "ended"

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        if (running := self._running.get(handle.id)) is not None:
            running.drain_s = timeout_s
            running.stop.set()
            await asyncio.wait((running.task,))

    def load(self, handle: Handle) -> InstanceLoad:
        """What a replica has to do now."""
        running = self._running.get(handle.id)
        return InstanceLoad() if running is None or running.engine is None else running.engine.load()
