"""Builds engine models from measurements and says how far they are off: ``python -m powerd_policies.dynamollm build|errors``.

House rules: the only part of this package that opens files by name; stdout holds the answer, stderr what went wrong; bad input is
exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from powerd.errors import EXIT_USAGE, PowerdError, RequestError
from powerd_policies.dynamollm import fit, models


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    try:
        rows = fit.latencies(_text(args.data), str(args.data))
        powers = () if args.watts is None else fit.batch_powers(_text(args.watts), str(args.watts))
        _build(args, rows, powers)
    except PowerdError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _build(args: argparse.Namespace, rows: Sequence[fit.Latency], powers: Sequence[fit.BatchPower]) -> None:
    gpu = fit.GPUS[args.gpu]
    assumed = fit.Assumptions(sensitivity=args.sensitivity, knee=args.knee, iteration_tokens=args.iteration_tokens)
    model = fit.build(rows, gpu, fit.LLAMA2_70B, assumed, fit.of_gpu(powers, gpu))
    text = models.dump(model)
    if args.out is None:
        print(text, end="")
        return
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {model.name}, TP {', '.join(map(str, model.tps))}, {len(gpu.clocks_mhz)} clocks; {model.origin}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", code="bad_value") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m powerd_policies.dynamollm", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="write the engine model of one GPU")
    build.add_argument("--data", type=Path, required=True, help="latency by parallelism, batch and prompt (splitwise-sim's CSV)")
    build.add_argument("--watts", type=Path, help="joules per request by batch (leaderboard-v2's CSV): scales decode's power")
    build.add_argument("--gpu", choices=sorted(fit.GPUS), default="h100")
    build.add_argument("--sensitivity", type=float, default=1.0, help="of decode to the clock: 0 worst, 1 suggested")
    build.add_argument("--knee", type=float, default=0.77, help="share of the highest clock below which the voltage is flat")
    build.add_argument("--iteration-tokens", type=int, default=2048, help="prompt tokens that one iteration computes at most")
    build.add_argument("-o", "--out", type=Path, help="where to write it; default: stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
