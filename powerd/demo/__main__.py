"""``python -m powerd.demo``: the main job on a simulated node, with its progress, its table and its pictures.

House rules: readable from top to bottom; every number is labelled simulated; whatever happens, the children end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from powerd.cli.choices import choice_line, choices_of, curve_table, front_of, points_of
from powerd.cli.output import console
from powerd.client import Client
from powerd.demo import result
from powerd.demo.children import Child, DemoError
from powerd.errors import PowerdError, UnavailableError
from powerd.sim.build import BuildError
from powerd.sim.node import SimError, SimNode, create
from powerd.sweep import Row

MODEL = "a100-sxm-500w"
SLOWDOWNS = (0.0, 0.05, 0.10)
START_S = 30.0
SLACK_S = 0.15  # real seconds that the work outlasts its window, for messages on a busy machine
EDGE_S = 0.05  # real seconds of work before the window, so that no sample at its edge saw an idle GPU
ATTEMPTS = 6
BUDGET_S = 55.0  # of the sweep, so that all is done within 90 s


@dataclass(frozen=True, slots=True)
class Stage:
    """What every step of the demonstration works with."""

    node: SimNode
    env: dict[str, str]
    folder: Path
    out: Path
    gpus: int
    scale: float
    children: contextlib.ExitStack

    def start(self, name: str, *arguments: str) -> Child:
        """Start a process that ends with the demonstration."""
        child = Child(name, arguments, self.env, self.folder / f"{name}.log")
        self.children.callback(child.stop)
        return child


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; 0 when every step showed what it should."""
    parser = argparse.ArgumentParser(prog="python -m powerd.demo", description="The main job on a simulated node.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the curve (SVG, PNG), CSV and JSON")
    parser.add_argument("--gpus", type=int, default=8, choices=range(1, 9), metavar="1..8")
    parser.add_argument("--scale", type=float, default=20.0, help="simulated seconds per real second")
    parser.add_argument("--seconds", type=float, default=10.0, help="simulated seconds of each energy window")
    parser.add_argument("--step", type=int, default=1, help="only every N-th measured clock")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    began_s = time.monotonic()
    try:
        with _stage(args.out, args.gpus, args.scale) as stage:
            code = _show(stage, args.seconds, args.step)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything that it started has ended", file=sys.stderr)
        return 130
    except (DemoError, PowerdError, BuildError, SimError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(
        f"\nDone in {time.monotonic() - began_s:.0f} s. Results: {args.out}/energy_time.svg, .png, .csv, result.json (simulated)"
    )
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _stage(out: Path, gpus: int, scale: float) -> Iterator[Stage]:
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as children:
        folder = Path(tempfile.mkdtemp(prefix="pd-demo-"))
        children.callback(shutil.rmtree, folder, ignore_errors=True)
        # The simulator knows every second measured clock only, so that the error at the others means something.
        node = children.enter_context(create(MODEL, gpus, f"x{scale:g}", fit_on="every-second"))
        ours = {"XDG_RUNTIME_DIR": folder, "XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}
        base = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "POWERD_KILL_AT")}
        env = {**base, **node.env(), **{k: str(v) for k, v in ours.items()}, "POWERD_SOCKET": str(folder / "powerd.sock")}
        yield Stage(node, env, folder, out, gpus, scale, children)


def _show(stage: Stage, seconds: float, step: int) -> int:
    print(f"A simulated node: {stage.gpus} x {stage.node.model_name}, time x{stage.scale:g} (all numbers below are simulated).")
    print(
        "Job: GPT-3 175B, one pipeline stage per GPU, from a profile measured on A100 SXM; durations are the published rows x 10."
    )
    client = _daemon(stage)
    index = {c.gpu.uuid: c.gpu.index for c in client.node().gpus}
    job = stage.start("job", "-m", "powerd.demo.job", str(stage.gpus))
    reader = stage.start("reader", "-m", "powerd.demo.reader", str(stage.gpus))
    sweeper = stage.start("client", "-m", "powerd.demo.client")
    job.next(START_S)
    truth = result.measured()
    measured_clocks = sorted({clock for _, clock in truth}, reverse=True)
    cells, verdicts = _sweep(stage, sweeper, job, measured_clocks[::step], seconds, index)
    rows = result.rows(cells, verdicts)
    summary = _tell(stage, rows, cells, truth, set(result.left_out(measured_clocks)))
    restored = _kill(stage, sweeper, job, reader, summary["hold_mhz"])
    (stage.out / "result.json").write_text(json.dumps({**summary, **restored}, indent=1) + "\n", encoding="utf-8")
    return 0 if restored["restored"] else 1


def _daemon(stage: Stage) -> Client:
    stage.start(
        "powerd",
        "-m",
        "powerd.main",
        "run",
        "--control",
        "--run-dir",
        str(stage.folder),
        "--state-dir",
        str(stage.folder / "state"),
    )
    client = Client(stage.env["POWERD_SOCKET"], timeout_s=10)
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            node = client.node()
            if node.hw_connected and node.control and len(client.snapshot().readings) == stage.gpus:
                print(f"powerd {node.version} and powerd-hw run, control is on, {len(node.gpus)} GPUs seen (simulated).")
                return client
        except UnavailableError as error:
            if time.monotonic() > deadline_s:
                raise DemoError(f"powerd did not come up: {error}") from error
        if time.monotonic() > deadline_s:
            raise DemoError("powerd did not come up: " + Path(stage.folder / "powerd.log").read_text(errors="replace")[-400:])
        time.sleep(0.1)


def _sweep(
    stage: Stage, sweeper: Child, job: Child, clocks: list[int], seconds: float, index: dict[str, int]
) -> tuple[list[result.Cell], dict[int, str]]:
    """At every clock: the job works on all GPUs, and a window of the daemon lies wholly inside that work; else once more."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shortest_s = min(time_s for time_s, _ in result.measured().values())  # of a microbatch, at the highest clock
    cells: list[result.Cell] = []
    verdicts: dict[int, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("sweeping SM clocks through one lease (simulated)", total=len(clocks))
        # Every second clock first: whatever the time allows, the whole range is covered.
        began_s = time.monotonic()
        for n, clock in enumerate([*clocks[::2], *clocks[1::2]]):
            if n >= len(clocks[::2]) and time.monotonic() - began_s > BUDGET_S:
                print(f"note: this machine is busy; {len(clocks) - n} of {len(clocks)} clocks are left out (simulated)")
                break
            slack_s = SLACK_S * stage.scale
            for _ in range(ATTEMPTS):
                sweeper.tell(f"clock {clock}")
                sweeper.next(START_S)
                job.tell(f"run {math.ceil((seconds + EDGE_S * stage.scale + slack_s) / shortest_s)}")
                job.next(START_S)
                time.sleep(EDGE_S)
                sweeper.tell(f"measure {seconds}")
                window, runs = sweeper.next(60), job.next(120)["runs"]
                if here := result.cells(clock, window, runs, index):
                    break
                slack_s *= 2  # this machine is busy: the window outlasted the work
            else:
                raise DemoError(f"{clock} MHz could not be measured: this machine is too busy; try a smaller --scale")
            cells += here
            verdicts[clock] = window["verdict"]
            bar.update(task, advance=1, description=f"{clock} MHz, all GPUs at once (simulated)")
    return cells, verdicts


def _tell(
    stage: Stage, rows: list[Row], cells: list[result.Cell], truth: dict[tuple[int, int], tuple[float, float]], unknown: set[int]
) -> dict[str, Any]:
    from powerd.plot import energy_time

    points = points_of(rows)
    choices = choices_of(points, SLOWDOWNS)
    print()
    console().print(
        curve_table(rows, choices, f"One microbatch through {stage.gpus} stage(s), time and energy added up (simulated)")
    )
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
    stages = range(stage.gpus)
    reference = [
        (clock, sum(truth[s, clock][0] for s in stages), sum(truth[s, clock][1] for s in stages))
        for clock in sorted({c for _, c in truth})
    ]
    energy_time(
        [stage.out / "energy_time.svg", stage.out / "energy_time.png"], list(xy.values()), simulated=True, measured=reference,
        title=f"GPT-3 175B, one microbatch, {stage.gpus} x {stage.node.model_name}", front=[xy[p] for p in front_of(points)],
        choices={f"{c.slowdown_allowed:.0%}": xy[c.point] for c in choices},
    )  # fmt: skip
    (stage.out / "energy_time.csv").write_text(result.to_csv(cells), encoding="utf-8")
    return {
        "simulated": True, "model": stage.node.model_name, "gpus": stage.gpus, "time_scale": stage.scale,
        "rows": [{k: v for k, v in asdict(r).items() if k != "figures"} for r in rows], "choices": [asdict(c) for c in choices],
        "error_percent": {"all": asdict(every), "not_fitted": asdict(held_out)}, "hold_mhz": choices[-1].point.clock_mhz,
    }  # fmt: skip


def _kill(stage: Stage, sweeper: Child, job: Child, reader: Child, hold_mhz: int) -> dict[str, Any]:
    """SIGKILL the client that holds the lease and let the independent reader say when the GPUs are back."""
    unlocked = max(clock for _, clock in result.measured())
    print(f"\nThe client now holds {hold_mhz} MHz on all GPUs under load and is about to be killed with SIGKILL (simulated).")
    began_ns = time.monotonic_ns()
    job.tell("loop")
    sweeper.tell(f"clock {hold_mhz}")
    sweeper.next(60)
    _until(reader, began_ns, lambda clocks: all(c == hold_mhz for c in clocks), f"all GPUs at {hold_mhz} MHz")
    print(f"  NVML reader: SM clocks {hold_mhz} MHz on all {stage.gpus} GPUs, before")
    killed_ns = time.monotonic_ns()
    sweeper.kill()
    try:
        message = _until(reader, killed_ns, lambda clocks: all(c == unlocked for c in clocks), f"all GPUs back at {unlocked} MHz")
    except DemoError as error:
        print(f"  NOT RESTORED: {error} (simulated)")
        return {"restored": False}
    took_s = (message["monotonic_ns"] - killed_ns) / 1e9
    now = message["clocks_mhz"]
    print(f"  NVML reader: SM clocks {max(now)} MHz on all {stage.gpus} GPUs, {took_s * 1000:.0f} ms after SIGKILL")
    print(f"  (real milliseconds; {took_s * stage.scale:.1f} simulated seconds at x{stage.scale:g})")
    print(f"  power limits: {', '.join(sorted({f'{mw / 1000:g} W' for mw in message['limits_mw']}))}\n")
    sys.stdout.flush()
    status = [sys.executable, "-m", "powerd.cli.main", "status"]
    subprocess.run(status, env=stage.env, timeout=30, check=True)
    return {"restored": True, "restore_real_s": took_s, "restore_simulated_s": took_s * stage.scale}


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
