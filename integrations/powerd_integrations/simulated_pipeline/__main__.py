"""``python -m powerd_integrations.simulated_pipeline``: trains on the simulated node that ``POWERD_SIM_STATE`` names.

House rules: without ``--rank`` it starts one process per GPU and ends them all with itself, as torchrun does; every line on
stdout is one JSON object; with ``--ask`` no step begins before a line on stdin says so.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from powerd.clock import from_environment
from powerd.errors import PowerdError
from powerd.sim.node import SimError, attach
from powerd_integrations.pipeline import Options
from powerd_integrations.simulated_pipeline.job import Job
from powerd_integrations.simulated_pipeline.launch import launch
from powerd_integrations.simulated_pipeline.mail import Mail, MailError
from powerd_integrations.simulated_pipeline.rank import Rank


def main(argv: list[str] | None = None) -> int:
    """Train; 0 when all steps were made."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="powerd_integrations.simulated_pipeline", description="Pipeline training, simulated.")
    parser.add_argument("--stages", default="0,2,5,7", metavar="N,N,...", help="the profile's stage that each stage is")
    parser.add_argument("--pipelines", type=int, default=1, help="data-parallel pipelines")
    parser.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, interleaved, zb-h1, zbv")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=1, help="stages per rank, of interleaved and zb-h1")
    parser.add_argument("--recompute", action="store_true", help="recompute activations before every backward")
    parser.add_argument("--profile", default="gpt3-175b", help="the node's measured kernels to use")
    parser.add_argument("--steps", type=int, default=10, help="iterations; with --ask at most so many")
    parser.add_argument("--ask", action="store_true", help="rank 0 reads a line before every step: go, or stop")
    parser.add_argument(
        "--conduct", metavar="JSON", help="let powerd save energy, with these pipeline.Options ({} for the defaults)"
    )
    parser.add_argument("--baseline", type=int, default=0, metavar="N", help="so many steps before powerd conducts")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mail", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        rows = tuple(int(word) for word in args.stages.split(","))
    except ValueError:
        parser.error(f"--stages is a list of numbers, not {args.stages!r}")
    try:
        options = None if args.conduct is None else _options(args.conduct)
        job = Job(rows, args.pipelines, args.schedule, args.microbatches, args.chunks, args.recompute, args.profile)
        if args.rank is None and len(job.graph.nodes):  # what is wrong with a schedule is said once, not by every rank
            return launch(job.world, arguments)
        return _train(job, options, args)
    except (PowerdError, SimError, MailError, ValueError) as error:
        who = "" if args.rank is None else f" rank {args.rank}"
        print(f"simulated_pipeline{who}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Voice:
    """The stdout that all ranks share: one JSON object per line, a line at a time however long it is."""

    def __init__(self, folder: Path) -> None:
        self._lock = (folder / "stdout.lock").open("a")

    def say(self, **message: object) -> None:
        """One line, at once."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        sys.stdout.write(json.dumps({"simulated": True, **message}) + "\n")
        sys.stdout.flush()
        fcntl.flock(self._lock, fcntl.LOCK_UN)


def _options(text: str) -> Options:
    values: dict[str, Any] = json.loads(text)
    if values.get("cache") is not None:
        values["cache"] = Path(values["cache"])
    try:
        return Options(**values)
    except TypeError as error:
        raise ValueError(f"--conduct: {error}") from None


def _train(job: Job, options: Options | None, args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    clock, voice = from_environment(), Voice(args.mail)
    with attach() as node:
        if job.world > node.gpus:
            raise ValueError(f"{job.world} ranks need as many GPUs, this node has {node.gpus}")
        mail = Mail(args.mail, args.rank, job.world, clock)
        rank = Rank(job, args.rank, node, clock, mail)
        if options is not None and clock.scale == 0.0:  # who works beside the ranks is not waited for in stepped time
            options = replace(options, background=False)
        mail.meet()
        voice.say(ready=args.rank)
        try:
            for number in range(args.steps):
                if mail.share(("begin", str(number)), 0, _go(args)) != "go":
                    break
                if options is not None and number == args.baseline:
                    rank.conduct(options)
                voice.say(**rank.run_step(number).to_json())
                if (plan := rank.new_plan()) is not None:
                    voice.say(**plan)
        finally:
            rank.close()
            mail.close()
    voice.say(done=args.rank, now_ns=clock.now_ns())
    return 0


def _go(args: argparse.Namespace) -> str:
    """What rank 0 is told; the clock stands meanwhile, when it is stepped."""
    return sys.stdin.readline().strip() if args.ask and args.rank == 0 else "go"


if __name__ == "__main__":
    sys.exit(main())
