"""``python -m powerd.demo``: the main job on a simulated node, with its progress, its table and its pictures.

House rules: readable from top to bottom; every number is labelled simulated; whatever happens, the children end.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from powerd.cli.choices import choice_line, choices_of, curve_table, front_of, points_of
from powerd.cli.output import console
from powerd.client import Client
from powerd.demo import perseus, result, service
from powerd.demo.children import Child, DemoError
from powerd.demo.stage import START_S, Stage, stage
from powerd.errors import PowerdError
from powerd.sim.build import BuildError
from powerd.sim.node import SimError
from powerd.sweep import Row

#: What is shown, in this order -> the files that it makes.
PARTS = {
    "sweep": ("energy_time.svg", "energy_time.png", "energy_time.csv"),
    "train": ("timeline.svg", "timeline.png", "plan.json"),
    "kill": (),
    "serve": ("service.svg", "service.png"),
}
SLOWDOWNS = (0.0, 0.05, 0.10)
BEGIN_NS = 60_000_000_000  # simulated, from the making of the node to the first lease
PATIENCE_S = 60.0  # real, without a word of the job


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; 0 when every step showed what it should."""
    parser = argparse.ArgumentParser(prog="python -m powerd.demo", description="The main job on a simulated node.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the curve (SVG, PNG), CSV and JSON")
    parser.add_argument("--gpus", type=int, default=8, choices=range(1, 9), metavar="1..8")
    parser.add_argument("--seconds", type=float, default=10.0, help="simulated seconds that an energy window lasts at least")
    parser.add_argument("--step", type=int, default=1, help="only every N-th measured clock")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST", help=f"of {','.join(PARTS)}; kill needs sweep")
    parser.add_argument(
        "--training-time", default="stepped", metavar="MODE", help="stepped, or a factor such as x10 (see docs/demo.md)"
    )
    parser.add_argument("--serving-seconds", type=float, default=600.0, metavar="S", help="of the conversation trace")
    holders = ("plan", "daemon", "daemon-strictest")
    parser.add_argument("--serving-clocks", default="plan", choices=holders, help="who holds DynamoLLM's (see docs/demo.md)")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS) or ("kill" in parts and "sweep" not in parts):
        parser.error(f"--parts are of {', '.join(PARTS)}, and kill needs sweep")
    if args.training_time != "stepped" and not re.fullmatch(r"x[0-9.]+", args.training_time):
        parser.error(f"--training-time is stepped or a factor such as x10, not {args.training_time!r}")
    signal.signal(signal.SIGTERM, _interrupt)
    began_s = time.monotonic()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        serving = (args.serving_seconds, args.serving_clocks)
        code = _show(args.out, args.gpus, args.seconds, args.step, parts, args.training_time, serving)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything that it started has ended", file=sys.stderr)
        return 130
    except (DemoError, PowerdError, BuildError, SimError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    made = [name for part, names in PARTS.items() if part in parts for name in names]
    files = ", ".join(f"{args.out}/{name}" for name in (*made, "result.json"))
    print(f"\nDone in {time.monotonic() - began_s:.0f} s. Results (simulated): {files}")
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show(
    out: Path, gpus: int, seconds: float, step: int, parts: Sequence[str], training_time: str, serving: tuple[float, str]
) -> int:  # fmt: skip
    summary: dict[str, Any] = {"simulated": True}
    if "sweep" in parts:
        summary |= _sweep_and_choose(out, gpus, seconds, step)
    if "train" in parts:
        summary["training"] = perseus.train(out, training_time)
    if "kill" in parts:
        print("\nAnother simulated node, in real time (time x1): the holder of a lease dies.")
        with stage(gpus, "real") as here:
            summary |= _kill(here, gpus, summary["hold_mhz"])
    if "serve" in parts:
        summary["service"] = service.serve(out, *serving)
    (out / "result.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0 if summary.get("restored", True) else 1


def _sweep_and_choose(out: Path, gpus: int, seconds: float, step: int) -> dict[str, Any]:
    truth = result.measured()
    measured_clocks = sorted({clock for _, clock in truth}, reverse=True)
    with stage(gpus, "stepped") as here:
        print(f"Job: GPT-3 175B, one pipeline stage on each of {gpus} simulated {here.node.model_name}, from a profile measured"
              " on A100 SXM;\ndurations are the published rows x 10. All numbers below are simulated.")  # fmt: skip
        model = here.node.model_name
        cells, verdicts = _sweep(here, gpus, measured_clocks[::step], seconds)
    rows = result.rows(cells, verdicts)
    return _tell(out, gpus, model, rows, cells, truth, set(result.left_out(measured_clocks)))


def _sweep(here: Stage, gpus: int, clocks: list[int], seconds: float) -> tuple[list[result.Cell], dict[int, str]]:
    """Every rank of the job goes through all clocks under its own lease and measures itself."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began_s = time.monotonic()
    if (now_ns := here.node.now_ns()) > (begin_ns := here.made_ns + BEGIN_NS):
        raise DemoError(f"powerd took {(now_ns - here.made_ns) / 1e9:.0f} simulated seconds to come up")
    ranks = here.start("job", "-m", "powerd.demo.ranks", str(gpus), str(begin_ns), str(seconds), json.dumps(clocks))
    ranks.next(START_S)
    here.go()
    cells: list[result.Cell] = []
    verdicts: dict[int, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("sweeping SM clocks through leases (simulated)", total=len(clocks) * gpus)
        while "done" not in (message := ranks.next(PATIENCE_S)):
            cells.append(cell := result.cell(message))
            # The least good of all GPUs.
            if verdicts.get(cell.clock_mhz, "applied") == "applied":
                verdicts[cell.clock_mhz] = message["verdict"]
            bar.update(task, advance=1, description=f"{cell.clock_mhz} MHz, GPU {cell.gpu} (simulated)")
    simulated_s = (message["now_ns"] - begin_ns) / 1e9
    print(f"Stepped time: {simulated_s:.0f} simulated seconds in {time.monotonic() - began_s:.0f} s"
          " (time moves only when every process waits; nothing depends on how fast this machine is).")  # fmt: skip
    return cells, verdicts


def _tell(
    out: Path, gpus: int, model: str, rows: list[Row], cells: list[result.Cell],
    truth: dict[tuple[int, int], tuple[float, float]], unknown: set[int],
) -> dict[str, Any]:  # fmt: skip
    from powerd.plot import energy_time

    points = points_of(rows)
    choices = choices_of(points, SLOWDOWNS)
    print()
    console().print(curve_table(rows, choices, f"One microbatch through {gpus} stage(s), time and energy added up (simulated)"))
    print()
    for choice in choices:
        print(choice_line(choice) + " (simulated)")
    every, held_out = result.error(cells, truth), result.error(cells, truth, unknown)
    print("\nError against the measured rows, per stage and clock (simulated):")
    for what, e in (("all", every), ("clocks that the simulator was not fitted on", held_out)):
        if e.rows:
            print(f"  {what} ({e.rows} rows): time mean {e.time_mean:.2f} %, largest {e.time_max:.2f} %;"
                  f" energy mean {e.energy_mean:.2f} %, largest {e.energy_max:.2f} %")  # fmt: skip
    xy = {p: (p.clock_mhz, p.time_s, p.energy_j) for p in points}
    stages = range(gpus)
    reference = [
        (clock, sum(truth[s, clock][0] for s in stages), sum(truth[s, clock][1] for s in stages))
        for clock in sorted({c for _, c in truth})
    ]
    energy_time(
        [out / "energy_time.svg", out / "energy_time.png"], list(xy.values()), simulated=True, measured=reference,
        title=f"GPT-3 175B, one microbatch, {gpus} x {model}", front=[xy[p] for p in front_of(points)],
        choices={f"{c.slowdown_allowed:.0%}": xy[c.point] for c in choices},
    )  # fmt: skip
    (out / "energy_time.csv").write_text(result.to_csv(cells), encoding="utf-8")
    return {
        "simulated": True, "model": model, "gpus": gpus, "time": "stepped",
        "rows": [{k: v for k, v in asdict(r).items() if k != "figures"} for r in rows], "choices": [asdict(c) for c in choices],
        "error_percent": {"all": asdict(every), "not_fitted": asdict(held_out)}, "hold_mhz": choices[-1].point.clock_mhz,
    }  # fmt: skip


def _kill(here: Stage, gpus: int, hold_mhz: int) -> dict[str, Any]:
    """SIGKILL the client that holds the lease and let the independent reader say when the GPUs are back."""
    unlocked = max(clock for _, clock in result.measured())
    reader = here.start("reader", "-m", "powerd.demo.reader", str(gpus))
    here.start("job", "-m", "powerd.demo.job", str(gpus)).next(START_S)
    _until(reader, 0, lambda clocks: all(c == unlocked for c in clocks), f"all GPUs at work at {unlocked} MHz")
    print(f"  NVML reader: SM clocks {unlocked} MHz on all {gpus} GPUs under load, before the lease (simulated)")
    client = here.start("client", "-m", "powerd.demo.client", str(hold_mhz))
    client.next(START_S)
    _until(reader, 0, lambda clocks: all(c == hold_mhz for c in clocks), f"all GPUs at {hold_mhz} MHz")
    print(f"  NVML reader: SM clocks {hold_mhz} MHz on all {gpus} GPUs, held by a client that is SIGKILLed now (simulated)")
    killed_ns = time.monotonic_ns()
    client.kill()
    try:
        message = _until(reader, killed_ns, lambda clocks: all(c == unlocked for c in clocks), f"all GPUs back at {unlocked} MHz")
    except DemoError as error:
        print(f"  NOT RESTORED: {error} (simulated)")
        return {"restored": False}
    took_s = (message["monotonic_ns"] - killed_ns) / 1e9
    print(f"  NVML reader: SM clocks {max(message['clocks_mhz'])} MHz on all {gpus} GPUs, restored after {took_s * 1000:.0f} ms"
          " (real milliseconds since SIGKILL; simulated driver)")  # fmt: skip
    print(f"  power limits: {', '.join(sorted({f'{mw / 1000:g} W' for mw in message['limits_mw']}))} (simulated)\n")
    sys.stdout.flush()
    _await_slow_readings(here)
    status = [sys.executable, "-m", "powerd.cli.main", "status"]
    subprocess.run(status, env=here.env, timeout=30, check=True)
    return {"restored": True, "restore_real_s": took_s}


def _await_slow_readings(here: Stage) -> None:
    """Utilisation is read once a second only: without this the table would show power of the load beside 0 % of before it."""
    deadline_s = time.monotonic() + 5.0
    with Client(here.env["POWERD_SOCKET"], timeout_s=10) as client:
        while not all(r.utilization_percent for r in client.snapshot().readings) and time.monotonic() < deadline_s:
            time.sleep(0.05)


def _until(reader: Child, after_ns: int, condition: Any, what: str, timeout_s: float = 20.0) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    last: dict[str, Any] = {}
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            last = reader.next(left_s)
        except DemoError:
            if reader.process.poll() is not None:
                raise
            break
        if last["monotonic_ns"] > after_ns and condition(last["clocks_mhz"]):
            return last
    raise DemoError(f"the NVML reader did not see {what} within {timeout_s:g} s; last clocks {last.get('clocks_mhz')}")


if __name__ == "__main__":
    sys.exit(main())
