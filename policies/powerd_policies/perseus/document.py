"""JOB.json and OUT.json: what a person writes about a pipeline and what a plan says back.

House rules: an unknown key is refused with the nearest valid name, a wrong value with its key; energies are of one pipeline with
one GPU per stage, times data_parallel x tensor_parallel, blocking until the deadline included; the baseline is every GPU at its
highest clock, within its own iteration time.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from powerd.errors import RequestError
from powerd_policies.perseus import baselines, dag, profile, schedules
from powerd_policies.perseus.problem import Instruction, Kind, Order, Plan, Problem
from powerd_policies.perseus.profile import NOISE, Row
from powerd_policies.perseus.switching import Switching

#: How much the rows of a running job may contradict each other: a planner that refuses them would end the saving, not the noise.
LIVE_NOISE = 0.5
#: Stages times microbatches: 256 ranks with 1,024 microbatches.
MOST = 2**18


@dataclass(frozen=True, slots=True)
class JobFile:
    """A pipeline to plan for, as JOB.json states it."""

    schedule: str = "1f1b"
    stages: int = 0  # pipeline ranks
    microbatches: int = 0
    profile: str | None = None  # a CSV, relative to the file that names it
    blocking_power_w: float = 0.0
    data_parallel: int = 1
    tensor_parallel: int = 1
    chunks: int = 1
    recompute: bool = False
    noise: float = NOISE
    order: tuple[tuple[Instruction, ...], ...] | None = None  # recorded; then schedule, stages and microbatches only describe
    switching: Switching | None = None  # what it costs to change a clock

    @property
    def gpus_per_stage(self) -> int:
        """How many GPUs each stage of the plan stands for."""
        return self.data_parallel * self.tensor_parallel

    def ranks_order(self) -> Order:
        """The order of every rank: the recorded one, else the schedule's."""
        if self.order is not None:
            return self.order
        return schedules.order(self.schedule, self.stages, self.microbatches, self.chunks, self.recompute)

    def problem(self, rows: Sequence[Row]) -> Problem:
        """What is to be planned, with these profile rows; RequestError when they are of another job."""
        graph = dag.build(self.ranks_order())
        stages = {node.stage for node in graph.nodes}
        if extra := sorted({row.stage for row in rows} - stages):
            raise RequestError(
                f"the profile has rows for stage {extra[0]}, the job has stages 0 to {max(stages)}",
                hint="stages counts pipeline ranks, chunks the stages that each holds", code="bad_value",
            )  # fmt: skip
        return dag.problem(graph, profile.options(rows, self.blocking_power_w), self.blocking_power_w)

    def to_json(self) -> dict[str, Any]:
        """The job as ``parse`` takes it, without the profile's place."""
        made: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("profile", "order", "noise", "switching")
        }
        if self.order is not None:
            made["order"] = [[[s.stage, str(s.kind), s.microbatch] for s in steps] for steps in self.order]
        if self.switching is not None:
            made["switching"] = asdict(self.switching)
        return made


def parse(content: object, name: str = "the job") -> JobFile:
    """A job from decoded JSON; RequestError naming the key that is unknown, missing or wrong."""
    if not isinstance(content, Mapping):
        raise _bad(f"{name}: a job is a JSON object, not {_type(content)}")
    known_keys(content, [f.name for f in fields(JobFile)], name)
    content = {key: value for key, value in content.items() if value is not None}
    order = _order(content["order"], name) if "order" in content else None
    for key in ("blocking_power_w", *(() if order is not None else ("schedule", "stages", "microbatches"))):
        if key not in content:
            raise _bad(f"{name}: {key} is missing")
    made: dict[str, Any] = {}
    for key, least in (("stages", 1), ("microbatches", 1), ("data_parallel", 1), ("tensor_parallel", 1), ("chunks", 1)):
        if key in content:
            made[key] = _integer(content[key], f"{name}: {key}", least)
    if order is not None:
        made = {"stages": len(order), "microbatches": max(map(schedules.microbatches_of, order), default=0), **made}
        if made["stages"] != len(order):
            raise _bad(f"{name}: stages is {made['stages']}, but the recorded order has {len(order)} ranks")
    for key in ("blocking_power_w", "noise"):
        if key in content:
            made[key] = _float(content[key], f"{name}: {key}", least=0.0)
    for key, kind in (("schedule", str), ("profile", str), ("recompute", bool)):
        if key in content:
            if not isinstance(content[key], kind):
                raise _bad(f"{name}: {key} is {json.dumps(content[key])}, not {_TYPES[kind]}")
            made[key] = content[key]
    if order is None and made["schedule"] not in schedules.SCHEDULES:
        near = difflib.get_close_matches(made["schedule"].lower(), schedules.SCHEDULES, 1, 0.5)
        raise _bad(f"{name}: schedule {made['schedule']!r} is not known" + (f", {near[0]!r} is" if near else ""),
                   f"one of {', '.join(schedules.SCHEDULES)}")  # fmt: skip
    if "switching" in content:
        made["switching"] = _switching(content["switching"], name)
    job = JobFile(order=order, **made)
    if (size := job.stages * job.chunks * job.microbatches) > MOST:
        raise _bad(f"{name}: {size} microbatches times stages", f"more than {MOST} are not planned")
    return job


def load(path: Path) -> tuple[JobFile, tuple[Row, ...]]:
    """A job and its profile from JOB.json; RequestError naming the file."""
    job = parse(read_json(path), str(path))
    if job.profile is None:
        raise _bad(f"{path}: profile is missing", "name a CSV with stage,instruction,frequency,time,energy")
    return job, profile.read(path.parent / job.profile, job.noise)


def rows_of(content: object, noise: float = LIVE_NOISE) -> tuple[Row, ...]:
    """Profile rows from decoded JSON: objects with the CSV's columns, or lists in their order.

    Checked like a file's but for holes and noise: a running job measures what it can, and plans with what it has.
    """
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise _bad(f"profile_rows is a list of rows, not {_type(content)}")
    rows = []
    for number, values in enumerate(content, 1):
        if isinstance(values, Mapping):
            cells = dict(values)
        elif isinstance(values, Sequence) and not isinstance(values, str):
            cells = dict(zip(profile.COLUMNS, values, strict=False))
            if len(values) != len(profile.COLUMNS):
                raise _bad(f"profile_rows: row {number} has {len(values)} values", f"columns are {','.join(profile.COLUMNS)}")
        else:
            raise _bad(f"profile_rows: row {number} is {_type(values)}")
        rows.append(profile.row_of(cells, number, "profile_rows", len(cells)))
    profile.check(rows, noise, holes=False)
    return tuple(rows)


def read_json(path: Path) -> object:
    """A file's JSON; RequestError naming the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}", code="bad_value") from error
    except ValueError as error:
        raise _bad(f"{path} is not JSON: {error}") from error


def deadline_s(text: str | float, baseline_s: float, fastest_s: float) -> float:
    """``1.05x`` (of the baseline's time), seconds, or ``fastest``, as seconds; RequestError below the shortest possible."""
    words = str(text).strip().lower()
    if words == "fastest":
        return fastest_s
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*(x|s|)", words)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number) or number <= 0:
        raise _bad(f"deadline {text!r} is not understood", "write 1.05x, seconds, or fastest")
    wanted_s = number * baseline_s if match[2] == "x" else number
    if wanted_s < fastest_s * (1 - baselines.EPSILON):
        raise _bad(f"deadline {text}: {wanted_s:.6g} s is below {fastest_s:.6g} s, the shortest possible iteration",
                   f"write fastest, or at least {math.ceil(fastest_s / baseline_s * 1e4) / 1e4:g}x")  # fmt: skip
    return max(wanted_s, fastest_s)


def shortest_s(problem: Problem) -> float:
    """The shortest possible iteration: every instruction as fast as it can be."""
    least = np.array([min(option.time_s for option in table) for table in problem.tables])
    return problem.dag.schedule(least[problem.table])[2]


def to_json(plan: Plan, baseline: Plan, job: JobFile | None = None) -> dict[str, Any]:
    """OUT.json of a plan; with ``job`` its energies are those of all its GPUs, and it can be drawn from the file alone."""
    times = (job or JobFile()).gpus_per_stage
    starts, _, _ = plan.problem.dag.schedule(plan.times_s)
    options = chosen(plan)
    made: dict[str, Any] = {
        "deadline_s": plan.deadline_s,
        "iteration_time_s": plan.iteration_time_s,
        "energy_j": plan.energy_j * times,
        "lower_bound_j": plan.lower_bound_j * times,
        "baseline": {
            "iteration_time_s": baseline.iteration_time_s,
            "energy_j": baseline.energy_j * times,
            "clocks": _highest(baseline, times),
        },
        "clocks": [
            {
                "stage": node.stage, "instruction": str(node.kind), "microbatch": node.microbatch, "mhz": option.mhz,
                "time_s": option.time_s, "energy_j": option.energy_j * times, "start_s": start,
            }
            for node, option, start in zip(plan.problem.dag.nodes, options, starts.tolist(), strict=True)
        ],
    }  # fmt: skip
    if plan.realised is not None:
        made["switching"] = {
            "iteration_time_s": plan.realised.iteration_time_s,
            "energy_j": plan.realised.energy_j * times,
            "switches": plan.realised.switches,
        }
    if job is not None:
        made["job"] = job.to_json()
    return made


def chosen(plan: Plan) -> list[Any]:
    """The option of every node."""
    tables = plan.problem.tables
    return [tables[t][c] for t, c in zip(plan.problem.table.tolist(), plan.choice.tolist(), strict=True)]


def _highest(baseline: Plan, times: int) -> list[dict[str, Any]]:
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for node, option in zip(baseline.problem.dag.nodes, chosen(baseline), strict=True):
        rows.setdefault((node.stage, str(node.kind)), {
            "stage": node.stage, "instruction": str(node.kind), "mhz": option.mhz, "time_s": option.time_s,
            "energy_j": option.energy_j * times,
        })  # fmt: skip
    return [rows[key] for key in sorted(rows)]


def _order(content: object, name: str) -> tuple[tuple[Instruction, ...], ...]:
    """``[[[stage, "forward", microbatch], ...] per rank]``."""
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise _bad(f"{name}: order is a list of ranks, each a list of [stage, instruction, microbatch]")
    made = []
    for rank, steps in enumerate(content):
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise _bad(f"{name}: order of rank {rank} is {_type(steps)}, not a list")
        row = []
        for place, step in enumerate(steps):
            good = isinstance(step, Sequence) and not isinstance(step, str) and len(step) == 3
            if not (good and type(step[0]) is int and isinstance(step[1], str) and step[1] and type(step[2]) is int):
                raise _bad(f"{name}: order of rank {rank}, instruction {place}: {json.dumps(step)}",
                           'write [stage, "forward", microbatch]')  # fmt: skip
            row.append(Instruction(step[0], Kind(step[1]) if step[1] in set(Kind) else step[1], step[2]))
        made.append(tuple(row))
    return tuple(made)


def _switching(content: object, name: str) -> Switching:
    if not isinstance(content, Mapping):
        raise _bad(f"{name}: switching is an object, not {_type(content)}")
    known_keys(content, [f.name for f in fields(Switching)], f"{name}: switching")
    made: dict[str, Any] = {}
    for key, value in content.items():
        place = f"{name}: switching.{key}"
        if key == "serialised":
            if not isinstance(value, bool):
                raise _bad(f"{place} is {json.dumps(value)}, not {_TYPES[bool]}")
            made[key] = value
        else:
            made[key] = _integer(value, place, 1) if key == "ranks_per_node" else _float(value, place, least=0.0)
    return Switching(**made)


def known_keys(content: Mapping[Any, Any], valid: Iterable[str], name: str) -> None:
    """RequestError for a key that is not valid, with the nearest one that is."""
    names = list(valid)
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.4)
            raise _bad(f"{name}: {key!r} is not known" + (f"; did you mean {near[0]!r}?" if near else ""),
                       "" if near else f"known are {', '.join(names)}")  # fmt: skip


def _integer(value: object, place: str, least: int) -> int:
    if type(value) is not int:
        raise _bad(f"{place} is {json.dumps(value)}, not a whole number")
    if value < least:
        raise _bad(f"{place} is {value}", f"it must be {least} or more")
    return value


def _float(value: object, place: str, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise _bad(f"{place} is {json.dumps(value)}, not a number")
    if value < least:
        raise _bad(f"{place} is {value:g}", f"it must be {least:g} or more")
    return float(value)


_TYPES: dict[type, str] = {str: "a text", bool: "true or false"}


def _type(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _bad(message: str, hint: str = "") -> RequestError:
    return RequestError(message, hint=hint, code="bad_value")
