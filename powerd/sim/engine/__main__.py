"""``powerd sim engine``: one simulated instance as a process, until SIGTERM.

House rules: one JSON line on stdout when it serves; SIGTERM drains, a second one ends it; times are simulated seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence

from powerd import clock as clocks
from powerd.arguments import Parser
from powerd.errors import PowerdError
from powerd.sim import enginemodels
from powerd.sim.engine.engine import Engine, Options
from powerd.sim.engine.hardware import SimulatedGpus, indices
from powerd.sim.engine.server import FAULTS, Fault, Server
from powerd.sim.node import SimError, attach


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `powerd sim engine`."""
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one; the line on stdout says which")
    parser.add_argument("--gpus", help="indices or UUIDs, with commas between (default: CUDA_VISIBLE_DEVICES, else the first)")
    parser.add_argument("--tp", type=int, help="tensor parallelism (default: the number of GPUs)")
    parser.add_argument("--model", default="llama2-70b_h100", help="engine model: a table of times and watts per TP and clock")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the engine model's")
    parser.add_argument("--chunk-tokens", type=int, default=512, help="prompt tokens of one iteration at most")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="requests in a batch at most")
    parser.add_argument("--max-model-len", type=int, default=16384, help="longest prompt and answer together")
    parser.add_argument("--scheduling-policy", choices=["fcfs", "priority"], default="fcfs",
                        help="who waits goes in the order of arrival, or by the request's priority, lowest first")  # fmt: skip
    parser.add_argument("--stream-interval", type=int, default=1, help="tokens per event of a stream, after the first")
    parser.add_argument(
        "--enable-per-request-metrics", action="store_true", help="the usage event of a stream tells the request's own latencies"
    )
    parser.add_argument("--start-delay", type=float, default=0.0, metavar="S", help="simulated seconds until it listens")
    parser.add_argument(
        "--shutdown-timeout", type=float, default=600.0, metavar="S", help="simulated seconds that SIGTERM waits for requests"
    )
    parser.add_argument("--fault", action="append", default=[], metavar="KIND[:TOKENS]",
                        help="; ".join(f"{name}: {text}" for name, text in FAULTS.items()))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; 0 when nobody was lost."""
    parser = Parser(prog="powerd sim engine", description="A simulated inference engine on simulated GPUs.")
    add_arguments(parser)
    return serve(parser.parse_args(argv))


def serve(args: argparse.Namespace) -> int:
    """Run what the arguments say: 0 when every request that it took was answered, 1 when not, 2 for bad arguments."""
    clock = clocks.from_environment()
    try:
        if not clock.simulated:
            raise SimError("no simulated node: run under `powerd sim run`")
        model = enginemodels.load(args.model)
        faults = tuple(Fault.parse(text) for text in args.fault)
        with attach() as node:
            named = args.gpus or os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = indices(node, named.split(",")) if named else tuple(range(args.tp or 1))
            if (tp := args.tp or len(gpus)) != len(gpus):
                raise ValueError(f"TP {tp} needs as many GPUs, {len(gpus)} are named")
            options = Options(model, tp, args.served_model_name or "", args.chunk_tokens, args.max_num_seqs, args.max_model_len,
                              args.enable_per_request_metrics, args.scheduling_policy == "priority")  # fmt: skip
            with SimulatedGpus(node, gpus) as hardware:
                return int(clocks.run(clock, _serve(args, Engine(options, hardware), faults)))
    except (SimError, PowerdError, ValueError, OSError) as error:
        print(f"powerd sim engine: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


async def _serve(args: argparse.Namespace, engine: Engine, faults: tuple[Fault, ...]) -> int:
    loop = asyncio.get_running_loop()
    told, again = asyncio.Event(), asyncio.Event()

    def end() -> None:
        (again if told.is_set() else told).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    if await _first(told, args.start_delay):
        return 0
    if any(fault.kind == "start-fails" for fault in faults):
        print("powerd sim engine: start-fails was asked for", file=sys.stderr)
        return 1
    server = Server(engine, host=args.host, port=args.port, stream_interval=args.stream_interval, faults=faults)
    async with engine, server:
        ready = {"simulated": True, "ready": True, "url": server.url, "pid": os.getpid(), "model": engine.name,
                 "tp": engine.options.tp}  # fmt: skip
        print(json.dumps(ready), flush=True)
        await told.wait()
        drain = loop.create_task(engine.drain(args.shutdown_timeout))
        stop = loop.create_task(again.wait())
        await asyncio.wait((drain, stop), return_when=asyncio.FIRST_COMPLETED)
        lost = drain.result() if drain.done() else engine.in_flight
        stop.cancel()
        drain.cancel()
        await asyncio.sleep(0)  # handlers write their last event before the connections are closed
    return 1 if lost else 0


async def _first(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came within so many seconds."""
    if seconds <= 0:
        return event.is_set()
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
