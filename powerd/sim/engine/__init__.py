"""A simulated inference engine: OpenAI's HTTP interface and vLLM's metrics, tokens at the speed of the simulated GPU's SM clock.

House rules: how long an iteration takes and what it draws is the EngineModel's alone; the clock is the one that the simulated
GPU has, never the one that was asked for; the core knows neither sockets nor time; everything says ``simulated``.

    async with Engine(Options(tp=4), SimulatedGpus.open((0, 1, 2, 3))) as engine:  # on a loop of the node's clock
        async for tokens in engine.submit(prompt_tokens=200, max_tokens=50):
            ...
"""

from powerd.sim.engine.engine import DrainingError, Engine, EngineDiedError, Options, PriorityError, Stream, TooLongError
from powerd.sim.engine.hardware import FixedClock, Hardware, SimulatedGpus

__all__ = [
    "DrainingError",
    "Engine",
    "EngineDiedError",
    "FixedClock",
    "Hardware",
    "Options",
    "PriorityError",
    "SimulatedGpus",
    "Stream",
    "TooLongError",
]
