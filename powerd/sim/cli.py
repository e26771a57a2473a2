"""`powerd sim`: make a simulated node for a command, disturb it, look at it.

House rules: the command runs as a child and its exit code and signals are passed on; what was made is removed;
every output says that it is simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from powerd.arguments import Parser
from powerd.sim import node as nodes
from powerd.sim.build import BuildError, build
from powerd.sim.faults import KINDS, PERMISSIONS
from powerd.sim.models import MODELS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `powerd sim`."""
    parser = Parser(prog="powerd sim", description="A simulated NVIDIA driver for this and every other NVML client.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run a command on a simulated node")
    run.add_argument("--gpus", type=int, default=8)
    run.add_argument("--model", default="h100-sxm", choices=list(MODELS))
    run.add_argument("--time", default="real", help="real, stepped, or a factor such as x20")
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--perm", default="any", choices=list(PERMISSIONS), help="who may change settings")
    run.add_argument("--no-persistence", action="store_true", help="settings are lost when the last client closes")
    run.add_argument("--latency", type=float, default=1.0, help="multiplies every injected driver latency, 0 = none")
    run.add_argument("--profile", action="append", default=[], metavar="NAME=CSV", help="add measured kernels, repeatable")
    run.add_argument(
        "--fit-on", choices=["all", "every-second"], default="all", help="measured clocks that kernels are built from"
    )
    run.add_argument("--quiet", action="store_true", help="do not say what was simulated")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD")
    fault = verbs.add_parser("fault", help="inject a fault (see `powerd sim faults`)")
    fault.add_argument("kind", choices=[*KINDS, "clear"])
    fault.add_argument("--gpu", type=int, help="only this GPU (default: all)")
    fault.add_argument("--value", type=int)
    fault.add_argument("--permission", choices=list(PERMISSIONS), default="none")
    fault.add_argument("--version", default="585.10.01", help="driver version after an upgrade")
    fault.add_argument("--function", default="*", help="rule: glob of NVML function names")
    fault.add_argument("--code", type=int, help="rule: return code (default: let the call run)")
    fault.add_argument("--delay", type=float, default=0.0, help="rule: simulated seconds that the call takes longer")
    fault.add_argument("--count", type=int, help="rule: fire at most this often")
    fault.add_argument("--after", type=int, default=0, help="rule: let this many calls pass first")
    fault.add_argument("--probability", type=float, default=1.0)
    fault.add_argument("--state", help=f"state file (default: ${nodes.STATE_VARIABLE})")
    verbs.add_parser("faults", help="list the faults")
    show = verbs.add_parser("show", help="the truth of the simulated node")
    show.add_argument("--json", action="store_true")
    show.add_argument("--state", help=f"state file (default: ${nodes.STATE_VARIABLE})")
    verbs.add_parser("engine", help="a simulated inference engine on this node's GPUs", add_help=False)
    verbs.add_parser("build", help="compile the simulated driver and print its path")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `powerd sim ARGV` and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["engine"]:
        return _engine(words[1:])
    args = build_parser().parse_args(words)
    try:
        if args.verb == "run":
            return _run(args)
        if args.verb == "fault":
            return _fault(args)
        if args.verb == "show":
            return _show(args)
        if args.verb == "faults":
            print("\n".join(f"{name:20} {kind.text}" for name, kind in KINDS.items()))
            return 0
        print(build())
        return 0
    except (nodes.SimError, BuildError, ValueError, FileNotFoundError) as error:
        print(f"powerd sim: {error}", file=sys.stderr)
        return 2


def _engine(words: list[str]) -> int:
    try:
        from powerd.sim.engine import __main__ as engine
    except ImportError as error:
        print(f"powerd sim: the engine needs {error.name}: pip install 'powerd[daemon,sim]'", file=sys.stderr)
        return 2
    return engine.main(words)


def _run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ValueError("no command: powerd sim run [options] -- CMD")
    if shutil.which(command[0]) is None:
        found = "/" in command[0] and os.path.exists(command[0])
        print(f"powerd sim: cannot run {command[0]}: {'permission denied' if found else 'not found'}", file=sys.stderr)
        return 126 if found else 127
    profiles = dict(_profile(text) for text in args.profile)
    with nodes.create(
        args.model,
        args.gpus,
        args.time,
        seed=args.seed,
        persistence=not args.no_persistence,
        perm=args.perm,
        latency=args.latency,
        profiles=profiles,
        fit_on=args.fit_on,
    ) as node:
        if not args.quiet:
            print(f"powerd sim: {args.gpus} x {node.model_name} (simulated), time {node.time}", file=sys.stderr)
        return _child(command, {**os.environ, **node.env()})


def _profile(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not found or not name or not path:
        raise ValueError(f"--profile is NAME=CSV, not {text!r}")
    return name, path


def _child(command: list[str], env: dict[str, str]) -> int:
    """Run the command, pass signals on to it, and die of what it died of."""
    try:
        child = subprocess.Popen(command, env=env)
    except (FileNotFoundError, PermissionError) as error:
        print(f"powerd sim: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    # Ctrl-C reaches the child through the terminal; only the child decides what it means.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _fault(args: argparse.Namespace) -> int:
    with nodes.attach(args.state) as node:
        if args.kind == "clear":
            node.clear_faults(args.gpu)
            print("faults cleared (simulated)")
            return 0
        slot = node.fault(
            args.kind,
            args.gpu,
            value=args.value,
            permission=args.permission,
            version=args.version,
            function=args.function,
            code=args.code,
            delay_s=args.delay,
            count=args.count,
            after=args.after,
            probability=args.probability,
        )
        where = "all GPUs" if args.gpu is None else f"GPU {args.gpu}"
        print(f"fault {args.kind} on {where} (simulated)" + ("" if slot is None else f", rule {slot}"))
        return 0


def _show(args: argparse.Namespace) -> int:
    with nodes.attach(args.state) as node:
        truth = node.show()
    if args.json:
        print(json.dumps(truth))
        return 0
    print(f"{truth['model']} (simulated), time {truth['time']}, now {truth['now_ns'] / 1e9:.3f} s")
    for row in truth["gpus"]:
        lock = row["locked_clocks_mhz"]
        joules = row["true_energy_mj"] / 1000
        flags = [name for name in ("lost", "hung", "frozen", "capped", "mig") if row[name]]
        print(
            f"  {row['gpu']:2} {row['clock_mhz']:6.0f} MHz {row['power_w']:6.1f} W {row['temperature_c']:4.0f} C "
            f"{joules:10.1f} J  limit {row['limit_mw'] / 1000:.0f}/{row['enforced_mw'] / 1000:.0f} W  "
            f"lock {f'{lock[0]}-{lock[1]}' if lock else '-'}  processes {row['processes']}  {' '.join(flags)}".rstrip()
        )
    return 0
