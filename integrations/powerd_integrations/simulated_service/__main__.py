"""``python -m powerd_integrations.simulated_service``: policies serve a trace on the node that ``POWERD_SIM_STATE`` names.

House rules: every line on stdout is one JSON object that says it is simulated; one policy after the other, each on a node at
rest, with the same requests; what controllers know of the load comes from before the trace.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from powerd import clock as clocks
from powerd.client import Client
from powerd.errors import PowerdError
from powerd.sim import enginemodels
from powerd.sim.node import SimError, attach
from powerd.sim.replay import policies as known
from powerd.sim.replay import scale, session
from powerd.sim.replay.trace import read
from powerd.sim.replay.workload import observations
from powerd_integrations.simulated_service.replicas import InProcess
from powerd_integrations.simulated_service.requests import Planned
from powerd_integrations.simulated_service.service import Setting, serve
from powerd_policies.dynamollm import policies
from powerd_policies.dynamollm.classes import NAMES, Classes, Slo
from powerd_policies.dynamollm.lengths import LengthTable
from powerd_policies.dynamollm.overheads import Overheads
from powerd_policies.dynamollm.predictor import LoadPredictor

REST_S = 30.0  # between two policies


def main(argv: list[str] | None = None) -> int:
    """Serve; 0 when every policy has served the whole trace."""
    parser = argparse.ArgumentParser(prog="powerd_integrations.simulated_service", description="A service, simulated.")
    parser.add_argument("--policies", default="singlepool,dynamollm", metavar="LIST")
    parser.add_argument("--trace", type=Path, help="CSV; default: the conversation trace that ships")
    parser.add_argument(
        "--begin", type=float, default=1800.0, metavar="S", help="where in the trace to begin; before is the past"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of the trace")
    parser.add_argument("--load", type=float, default=0.15, help="share of the trace's requests")
    parser.add_argument("--ttft", default="1.5,1.5,4", metavar="S,M,L", help="SLO of short, medium and long prompts, seconds")
    parser.add_argument("--tbt", type=float, default=0.15, help="SLO between tokens, seconds")
    parser.add_argument("--model", default="llama2-70b_h100")
    parser.add_argument(
        "--clocks", default="plan", choices=["plan", "daemon", "daemon-strictest"], help="who decides the clocks of dynamollm"
    )
    parser.add_argument("--ask", action="store_true", help="say ready, and begin when a line on stdin says so")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        return _serve_all(args)
    except (PowerdError, SimError, ValueError, RuntimeError) as error:
        print(f"simulated_service: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def say(**message: object) -> None:
    """One line, at once."""
    sys.stdout.write(json.dumps({"simulated": True, **message}) + "\n")
    sys.stdout.flush()


def _serve_all(args: argparse.Namespace) -> int:
    clock = clocks.from_environment()
    model = enginemodels.load(args.model)
    hour = read(args.trace or session.shipped_hour())
    past, part = hour.between(0, args.begin), hour.between(args.begin, args.begin + args.seconds)
    trace = scale.scaled(part, args.load, args.seed)
    ttfts = dict(zip("SML", map(float, args.ttft.split(",")), strict=True))
    classes = Classes(slos={name: Slo(ttfts[name[0]], args.tbt) for name in NAMES})
    fits = [
        row
        for row in zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True)
        if row[1] <= classes.context_limit
    ]
    requests = [Planned(float(at_s), int(prompt), int(output)) for at_s, prompt, output in fits]
    lengths = LengthTable.train(past.prompt_tokens, past.output_tokens, classes)
    guesses = dict(
        zip(range(1, classes.context_limit + 1), lengths.tokens(range(1, classes.context_limit + 1)).tolist(), strict=True)
    )
    overheads = Overheads()
    setting = Setting(model, classes, requests, lambda prompt, most: min(most, guesses.get(prompt, most)), overheads.start_s())
    loop = clock.new_event_loop()
    with clocks.running(loop), attach() as node, Client(timeout_s=60) as client:
        said: dict[str, Any] = {"requests": len(requests), "too_long": len(trace) - len(requests), "seconds": part.length_s}
        say(ready=True, **said, ttft_s=ttfts, tbt_s=args.tbt, model=model.name, gpus=node.gpus, origin=model.origin)
        if args.ask:
            sys.stdin.readline()
        for name in args.policies.split(","):
            predictor = LoadPredictor()
            predictor.learn(_history(scale.scaled(past, args.load, args.seed + 1), classes))
            controller = policies.build(
                name, model=model, classes=classes, gpus=node.gpus, lengths=known.lengths(classes, past), overheads=overheads,
                predictor=predictor,
            )  # fmt: skip
            launcher = InProcess(node, model, setting.start_s)
            hold = args.clocks if controller.name == "dynamollm" else "plan" if "freq" in name else "nothing"
            served = loop.run_until_complete(serve(controller, setting, launcher, client, say, hold=hold))
            say(served=asdict(served))
            loop.run_until_complete(_rest(REST_S))
    say(done=True)
    return 0


async def _rest(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


def _history(past: Any, classes: Classes) -> Iterable[Any]:
    """What was observed before the trace's time 0, in the controllers' time."""
    return [
        (at_s - past.length_s, window_s, load)
        for at_s, window_s, load in observations(past, classes, 60.0)
        if at_s <= past.length_s
    ]


if __name__ == "__main__":
    sys.exit(main())
