"""``python -m powerd_integrations.fleet.sidecar ... -- vllm serve ...``: an engine in a container, with powerd beside it.

House rules: registers the engine with the node's powerd, which holds the lowest safe clock, and reports it to the planner; at
SIGTERM it says that the engine drains, waits until routers know, lets the engine finish, and says goodbye; powerd or planner may
be away: it is said once, and the engine serves.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Final

from powerd.client import Client
from powerd_integrations.fleet import chunk, scrape
from powerd_integrations.fleet.reporter import InstanceReporter, PlannerLink
from powerd_policies.dynamollm.fleet import InstanceLoad, InstanceState, Phase

log = logging.getLogger("powerd.fleet")
AWAY_S: Final = 5.0  # an engine that has not answered for so long while it drains is gone


class Sidecar:
    """What one engine's sidecar knows of it."""

    def __init__(self, name: str, pool: str, tp: int, engine: str) -> None:
        self.name, self.pool, self.tp = name, pool, tp
        self.url = engine.rstrip("/") + "/metrics"
        self.draining = False
        self.clock_mhz = 0
        self._page: scrape.Page | None = None
        self._load, self._read_s = InstanceLoad(), -1.0

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's page was read last; from the begin where it never was."""
        return time.monotonic() - self._read_s if self._read_s >= 0 else float("inf")

    def state(self) -> InstanceState:
        """Read the engine's page and return what the planner is told."""
        now_s = time.monotonic()
        try:
            page = scrape.fetch(self.url, now_s)
            self._load, self._page, self._read_s = scrape.load_of(page, self._page), page, now_s
        except (OSError, ValueError) as error:
            log.debug("%s: its metrics cannot be read: %s", self.name, error)
        known = self._read_s >= 0
        phase: Phase = "draining" if self.draining else "serving" if known else "starting"
        load = replace(self._load, age_s=time.monotonic() - self._read_s if known else 0.0)
        return InstanceState(self.name, self.pool, self.tp, self.clock_mhz, phase, load=load)


def main(argv: list[str] | None = None) -> int:
    """Run the engine, or stand beside one that runs, until SIGTERM and the engine's end; its exit code."""
    words = sys.argv[1:] if argv is None else argv
    command = words[words.index("--") + 1 :] if "--" in words else []
    args = _arguments(words[: words.index("--")] if "--" in words else words, command)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sidecar = Sidecar(args.name, args.pool, args.tp, args.engine)
    reporter = InstanceReporter(PlannerLink(args.planner), sidecar.state) if args.planner else None
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL) if command else None
    client = Client(args.socket, on_error="log")
    with client.register_replica(
        args.name, pool=args.pool, metrics_url=sidecar.url, ttft_s=args.ttft, tbt_s=args.tbt, classes=dict(args.ttft_up_to),
        tp=args.tp, profile=args.profile, chunk_tokens=args.chunk_tokens,
    ) as replica:  # fmt: skip
        print(f"powerd-sidecar: {args.name} of {args.pool} at TP{args.tp}", flush=True)
        while not stop.wait(1.0) and (child is None or child.poll() is None):
            views = client.replicas() if replica.held else ()
            sidecar.clock_mhz = next((view.clock_mhz or 0 for view in views if view.id == replica.id), 0)
        sidecar.draining = True
        code = _drained(sidecar, child, args.settle)
    if reporter is not None:
        reporter.close()
    return code


def _drained(sidecar: Sidecar, child: subprocess.Popen[bytes] | None, settle_s: float) -> int:
    """Let routers forget the engine, tell it to end, wait until it has finished what runs."""
    if child is None:
        while sidecar.state() and sidecar.silent_s < AWAY_S:
            time.sleep(0.2)
        return 0
    try:
        child.wait(settle_s)
    except subprocess.TimeoutExpired:
        child.terminate()
    return child.wait()


def _arguments(words: list[str], command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="powerd_integrations.fleet.sidecar", usage="%(prog)s [options] [-- ENGINE...]",
        description="Registers an engine with this node's powerd and with the planner, and ends it without losing requests.",
    )  # fmt: skip
    parser.add_argument("--name", required=True, help="unique in the fleet, such as the pod's name")
    parser.add_argument("--pool", required=True)
    parser.add_argument("--tp", required=True, type=int, help="tensor parallelism")
    parser.add_argument(
        "--engine", default="http://127.0.0.1:8000", metavar="URL", help="where it listens (default: %(default)s)"
    )
    parser.add_argument("--planner", metavar="URL", help="report to this planner; not where it scrapes the engine itself")
    parser.add_argument("--ttft", type=float, metavar="S", help="SLO: seconds to the first token")
    parser.add_argument("--ttft-up-to", type=_shorter, action="append", default=[], metavar="TOKENS=S",
                        help="a shorter one for prompts of at most so many tokens; may be repeated")  # fmt: skip
    parser.add_argument("--tbt", type=float, metavar="S", help="SLO: seconds between tokens; this or --ttft, or both")
    parser.add_argument("--chunk-tokens", type=int, default=512, metavar="TOKENS",
                        help="prompt tokens of an iteration: vLLM's --max-num-batched-tokens (default: %(default)s)")  # fmt: skip
    parser.add_argument("--profile", help="by which powerd knows the engine's speed and power")
    parser.add_argument("--socket", help="of the node's powerd, where it is not in its usual place")
    parser.add_argument("--settle", type=float, default=10.0, metavar="S",
                        help="from SIGTERM until the engine gets it: routers forget it first (default: %(default)g)")  # fmt: skip
    args = parser.parse_args(words)
    for url in (args.engine, args.planner or "http://"):
        if not url.startswith(("http://", "https://")):
            parser.error(f"a URL begins with http:// or https://, not {url!r}")
    if args.ttft is None and args.tbt is None:
        parser.error("an SLO is missing: --ttft, --tbt or both")
    if wrong := chunk.problem(command, args.chunk_tokens):
        parser.error(wrong)
    return args


def _shorter(word: str) -> tuple[int, float]:
    tokens, _, seconds = word.partition("=")
    try:
        return int(tokens), float(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"prompt tokens, = and seconds, such as 255=0.25, not {word!r}") from None


if __name__ == "__main__":
    sys.exit(main())
