"""Engine models and profiles from measurements: ``python -m powerd_policies.dynamollm build|errors|profile``.

House rules: the only part of this package that opens files by name; stdout holds the answer, stderr what went wrong; bad input is
exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from powerd.errors import EXIT_USAGE, PowerdError, RequestError
from powerd_policies.dynamollm import assess, fit, models, profile_file, steady
from powerd_policies.dynamollm.classes import NAMES, Classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except PowerdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _measured(args: argparse.Namespace) -> tuple[Sequence[fit.Latency], Sequence[fit.BatchPower]]:
    rows = fit.latencies(_text(args.data), str(args.data))
    return rows, () if args.watts is None else fit.batch_powers(_text(args.watts), str(args.watts))


def _build(args: argparse.Namespace) -> None:
    rows, powers = _measured(args)
    gpu = fit.GPUS[args.gpu]
    assumed = fit.Assumptions(sensitivity=args.sensitivity, knee=args.knee, iteration_tokens=args.iteration_tokens)
    model = fit.build(rows, gpu, fit.LLAMA2_70B, assumed, fit.of_gpu(powers, gpu))
    if _write(args.out, models.dump(model)):
        print(f"{args.out}: {model.name}, TP {', '.join(map(str, model.tps))}, {len(gpu.clocks_mhz)} clocks; {model.origin}")


def _errors(args: argparse.Namespace) -> None:
    print(assess.table(assess.figures(*_measured(args))))


def _profile(args: argparse.Namespace) -> None:
    model, classes = models.load(args.model), Classes()
    lengths = steady.lengths_of(_text(args.trace), classes, str(args.trace))
    profile = steady.profile_of(model, lengths, classes, args.chunk_tokens, args.max_running)
    if _write(args.out, profile_file.dump(profile)):
        held = ", ".join(name for name in NAMES if name in profile.classes)
        print(f"{args.out}: {len(profile.points)} points, modelled; classes {held}; TP {', '.join(map(str, profile.tps))}")
    for said in profile.infeasible(classes.slos).values():
        print(f"note: {said}", file=sys.stderr)


def _write(out: Path | None, text: str) -> bool:
    """Whether it was written to a file; else it is on stdout."""
    if out is None:
        print(text, end="")
        return False
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {out}: {error.strerror or error}", code="bad_value") from error
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", code="bad_value") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m powerd_policies.dynamollm", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="write the engine model of one GPU")
    errors = commands.add_parser("errors", help="say how far the models are off, where measurements can tell")
    for command in (build, errors):
        command.add_argument("--data", type=Path, required=True, help="latency by parallelism and batch (splitwise-sim's CSV)")
        command.add_argument("--watts", type=Path, help="joules per request by batch (leaderboard-v2's CSV): decode's power")
    errors.set_defaults(run=_errors)
    build.set_defaults(run=_build)
    build.add_argument("--gpu", choices=sorted(fit.GPUS), default="h100")
    build.add_argument("--sensitivity", type=float, default=1.0, help="of decode to the clock: 0 worst, 1 suggested")
    build.add_argument("--knee", type=float, default=0.77, help="share of the highest clock below which the voltage is flat")
    build.add_argument("--iteration-tokens", type=int, default=2048, help="prompt tokens that one iteration computes at most")
    profile = commands.add_parser("profile", help="tabulate (class, parallelism, clock, load) from an engine model and a trace")
    profile.add_argument("--model", type=Path, required=True, help="what build wrote")
    profile.add_argument("--trace", type=Path, required=True, help="CSV with ContextTokens and GeneratedTokens")
    profile.add_argument("--chunk-tokens", type=int, default=512, help="prompt tokens that an iteration computes beside decode")
    profile.add_argument("--max-running", type=int, default=256, help="requests that one instance decodes at most")
    profile.set_defaults(run=_profile)
    for command in (build, profile):
        command.add_argument("-o", "--out", type=Path, help="where to write it; default: stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
