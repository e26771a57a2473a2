"""The verb ``dynamollm profile``: a real endpoint's energy and latencies by request class, SM clock and load.

House rules: one lease for all clocks; every finished cell is on disk before the next begins, and is not measured again; a
clock whose SLO was missed gets no higher load; energy is the daemon's, of whole windows.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerd.cli.context import DryRun, GpuOption, connect, note, simulated, split_gpus
from powerd.cli.output import console, table
from powerd.errors import EXIT_CONFLICT, EXIT_OK, RequestError, UnavailableError

if TYPE_CHECKING:
    import aiohttp

    from powerd.api import NodeView
    from powerd.cli.endpointload import Asked
    from powerd.client import Client, Lease
    from powerd_policies.dynamollm.classes import Classes
    from powerd_policies.dynamollm.profile import ProfilePoint

EXIT_INTERRUPTED = 130
PATIENCE = 2.0  # times the measured seconds that the last answers may take
HEAD = "class,tp,clock_mhz,requests_per_s,energy_per_request_j,ttft_p99_s,tbt_p99_s,power_w,feasible,source"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement."""

    request_class: str
    clock_mhz: int
    rate: float


@dataclass(frozen=True, slots=True)
class About:
    """What a profile is of; a file is only continued by the same."""

    endpoint_model: str
    gpu: str
    gpus: int
    driver: str | None
    simulated: bool
    seconds: float
    seed: int
    context_tokens: int | None = None


def profile(
    ctx: typer.Context,
    endpoint: Annotated[str, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible, such as http://127.0.0.1:8000.")],
    clocks: Annotated[str, typer.Option("--clocks", metavar="LIST", help="1980:1080:150, 1980,1380 or 'every 8'.")],
    rates: Annotated[str, typer.Option("--rates", metavar="LIST", help="Requests per second, such as 0.5,1,2,4.")],
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Tensor parallelism; default: the number of GPUs.")] = None,
    gpus: GpuOption = None,
    names: Annotated[
        str, typer.Option("--classes", metavar="LIST", help="Request classes, such as SS,MM,LL; default: all nine.")
    ] = "",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Seconds that a cell is measured.")] = 60.0,
    warmup: Annotated[float, typer.Option("--warmup", min=0, help="Seconds of load before that.")] = 10.0,
    ttft: Annotated[
        float | None, typer.Option("--ttft", metavar="S", help="SLO of all classes; default: each class's own.")
    ] = None,
    tbt: Annotated[
        float | None, typer.Option("--tbt", metavar="S", help="SLO between tokens; default: each class's own.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option("--lengths", metavar="CSV", help="A trace whose lengths are drawn; default: the shipped hour.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="CSV; what it holds is not measured again.")
    ] = Path("profile.csv"),
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and prompts.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """Measure energy, TTFT and TBT of an endpoint on this node's GPUs, by request class, SM clock and load."""
    from powerd.clock import from_environment, run
    from powerd.sweep import parse_clocks
    from powerd_policies.dynamollm.classes import NAMES, Classes, Slo

    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise RequestError("measuring an endpoint needs aiohttp", hint="pip install 'powerd[cli,daemon]'") from None
    classes = Classes()
    classes = Classes(slos={n: Slo(ttft or slo.ttft_s, tbt or slo.tbt_s) for n, slo in classes.slos.items()})
    chosen = [name.strip().upper() for name in names.split(",") if name.strip()] or list(NAMES)
    if unknown := [name for name in chosen if name not in NAMES]:
        raise RequestError(f"there is no request class {unknown[0]!r}", hint=f"classes are {', '.join(NAMES)}", code="bad_value")
    client = connect(ctx)
    node, uuids = client.node(), client.resolve(split_gpus(gpus))
    found = [c for c in node.gpus if c.gpu.uuid in uuids]
    if (wanted := tp or len(found)) != len(found):
        raise RequestError(f"TP {wanted} runs on {wanted} GPUs, {len(found)} are named", hint="name them with --gpus")
    at_clocks = parse_clocks(clocks, sorted(set.intersection(*(set(c.sm_clocks_mhz) for c in found))))
    loads = _rates(rates)
    _that_come(loads, warmup, seconds, seed)
    cells = [Cell(name, clock, rate) for name in chosen for clock in at_clocks for rate in loads]
    label = f" ({simulated(node)})" if node.simulated else ""
    if dry_run:
        print(
            f"would measure {len(cells)} cells of {seconds:g} s at {endpoint} on {len(found)} GPU(s){label}; nothing was changed"
        )
        return
    about = About(
        "", " + ".join(sorted({c.gpu.name for c in found})), len(found), node.driver_version, node.simulated, seconds, seed
    )
    drawn = _lengths(lengths, classes, chosen)
    job = _Job(client, node, uuids, endpoint.rstrip("/"), classes, drawn, seconds, warmup, seed)
    code = run(from_environment(), _until_interrupted(_measure(job, cells, about, output)))
    if code == EXIT_INTERRUPTED:
        note(f"interrupted: {output} holds what was measured, and the same command goes on there")
    else:
        _tell(output, label)
    raise typer.Exit(code)


def _rates(text: str) -> list[float]:
    try:
        values = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        values = []
    if not values or values[0] <= 0:
        raise RequestError(f"{text!r} are no rates", hint="write requests per second, such as 0.5,1,2", code="bad_value")
    return values


def _that_come(rates: Sequence[float], warmup_s: float, seconds: float, seed: int) -> None:
    """RequestError when a load is so low that none of its requests would be measured."""
    from powerd.cli.endpointload import poisson

    for rate in rates:
        if not any(at_s >= warmup_s for at_s in poisson(rate, warmup_s + seconds, seed)):
            raise RequestError(
                f"at {rate:g}/s no request comes in the {seconds:g} s that are measured", hint="give more --seconds"
            )


def _lengths(path: Path | None, classes: Classes, names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Prompt and output tokens of a trace's requests of each class."""
    from powerd.sim.replay import session, trace

    found: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    rows = trace.read(path or session.shipped_hour())
    for prompt, output in zip(rows.prompt_tokens.tolist(), rows.output_tokens.tolist(), strict=True):
        if (name := classes.name(prompt, output)) in found:
            found[name].append((prompt, output))
    for name, pairs in found.items():
        if not pairs:
            raise RequestError(f"{path or 'the shipped hour'} has no request of class {name}", hint="leave it out of --classes")
        random.Random(name).shuffle(pairs)  # noqa: S311  (an order, no secret)
    return found


def _that_fit(lengths: dict[str, list[tuple[int, int]]], context_tokens: int | None) -> dict[str, list[tuple[int, int]]]:
    """Those that the endpoint's context holds: what is longer it refuses, or answers with fewer tokens without saying so."""
    if context_tokens is None:
        return lengths
    fit = {name: [pair for pair in pairs if sum(pair) <= context_tokens] for name, pairs in lengths.items()}
    for name, pairs in fit.items():
        context = f"the endpoint's context of {context_tokens} tokens"
        if not pairs:
            shortest = f"the shortest has {min(map(sum, lengths[name]))}"
            raise RequestError(f"{context} holds no request of class {name}: {shortest}", hint="leave it out of --classes")
        if left_out := 1 - len(pairs) / len(lengths[name]):
            note(f"class {name}: {left_out:.1%} of the requests are longer than {context} and left out")
    return fit


@dataclass(frozen=True)
class _Job:
    client: Client
    node: NodeView
    uuids: tuple[str, ...]
    endpoint: str
    classes: Classes
    lengths: dict[str, list[tuple[int, int]]]
    seconds: float
    warmup_s: float
    seed: int
    model: str = ""
    ids: range = range(0)


async def _until_interrupted(work: Coroutine[Any, Any, int]) -> int:
    """Do it, and on the first SIGINT or SIGTERM end what is in flight and give the lease back."""
    import asyncio

    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return EXIT_INTERRUPTED


async def _measure(job: _Job, cells: Sequence[Cell], about: About, output: Path) -> int:
    import asyncio

    import aiohttp

    from powerd.cli.endpointload import connector, served, token_ids

    async with aiohttp.ClientSession(**connector()) as session:
        found = await served(session, job.endpoint)
        job = replace(job, model=found.model, lengths=_that_fit(job.lengths, found.context_tokens))
        done = _begin(output, replace(about, endpoint_model=found.model, context_tokens=found.context_tokens))
        todo = [cell for cell in cells if not _known(cell, done, len(job.uuids))]
        if len(todo) < len(cells):
            note(f"{len(cells) - len(todo)} of {len(cells)} cells are in {output} already, or beyond a load that missed its SLO")
        if not todo:
            return EXIT_OK
        job = replace(job, ids=await token_ids(session, job.endpoint, job.model))
        top = max(cell.clock_mhz for cell in todo)
        lease = await asyncio.to_thread(
            job.client.lease, list(job.uuids), sm_clock_mhz=top, reason=f"profile of {job.model}", min_dwell_s=0.0
        )
        try:
            if lease.refused:
                note(f"the clocks cannot be set: {lease.refused[0].why}")
                return EXIT_CONFLICT
            await _all(job, session, lease, todo, done, output)
        finally:
            await asyncio.to_thread(lease.release)
    return EXIT_OK


async def _all(
    job: _Job,
    session: aiohttp.ClientSession,
    lease: Lease,
    todo: Sequence[Cell],
    done: list[ProfilePoint],
    output: Path,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    label = f" ({simulated(job.node)})" if job.node.simulated else ""
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=len(todo))
        for cell in todo:
            bar.update(task, description=f"{cell.request_class}, {cell.clock_mhz} MHz, {cell.rate:g}/s{label}")
            if not _known(cell, done, len(job.uuids)):
                point, failed = await _one(job, session, lease, cell)
                done.append(point)
                _append(output, point)
                if not point.feasible:
                    what = f"{cell.request_class} at {cell.clock_mhz} MHz misses its SLO at {cell.rate:g}/s"
                    note(f"{what}{f' ({failed})' if failed else ''}: no higher load there")
            bar.advance(task)


async def _one(job: _Job, session: aiohttp.ClientSession, lease: Lease, cell: Cell) -> tuple[ProfilePoint, str]:
    """Measure one cell: load, wait until it is warm, a window, the last answers; and say which requests failed."""
    import asyncio

    from powerd.cli.endpointload import Load, p99
    from powerd_policies.dynamollm.profile import ProfilePoint

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(lease.change, sm_clock_mhz=cell.clock_mhz, wait_s=2.0)
    window = job.client.energy(f"profile {cell.request_class} {cell.clock_mhz} MHz {cell.rate:g}/s", list(job.uuids))
    lengths = job.lengths[cell.request_class]
    async with Load(session, job.endpoint, job.model, job.ids, lengths, cell.rate, job.seed) as load:
        load.begin(job.warmup_s + job.seconds)
        await asyncio.sleep(job.warmup_s)
        await asyncio.to_thread(window.begin)
        begin_s = loop.time()
        await asyncio.sleep(job.seconds)
        end_s = loop.time()
        await asyncio.to_thread(window.end)
        asked = await load.end(PATIENCE * job.seconds)
    counted = [a for a in asked if a.sent_s == 0.0 or begin_s <= a.sent_s <= end_s]
    ttft, tbt = _latency(counted, p99)
    energy_j, duration_s = window.energy_j, window.duration_s
    if energy_j is None or duration_s is None:
        raise UnavailableError("powerd measured no energy", hint="see `powerctl status`")
    if not counted or ttft is None:
        why = next((a.error for a in asked if a.error), "no request came while it was measured: give more --seconds")
        raise RequestError(f"{cell.request_class} at {cell.rate:g}/s: the endpoint made no token: {why}")
    slo = job.classes.slos[cell.request_class]
    errors = [a.error for a in counted if a.error]
    failed = f"{len(errors)} of {len(counted)} requests failed: {errors[0]}" if errors else ""
    good = not errors and ttft <= slo.ttft_s and (tbt or 0.0) <= slo.tbt_s
    point = ProfilePoint(
        cell.request_class, len(job.uuids), cell.clock_mhz, cell.rate, energy_j / duration_s * (end_s - begin_s) / len(counted),
        ttft, tbt or 0.0, energy_j / duration_s, good, "modelled" if job.node.simulated else "measured",
    )  # fmt: skip
    return point, failed


def _latency(asked: Sequence[Asked], p99: Callable[[Sequence[float]], float | None]) -> tuple[float | None, float | None]:
    return p99([a.ttft_s for a in asked if a.ttft_s is not None]), p99([gap for a in asked for gap in a.gaps_s])


# -- the file ------------------------------------------------------------------------------------------------------------------


def _known(cell: Cell, done: Sequence[ProfilePoint], tp: int) -> bool:
    """Whether a cell needs no measuring: it was, or a lower load missed the SLO already."""
    here = [p for p in done if (p.request_class, p.tp, p.clock_mhz) == (cell.request_class, tp, cell.clock_mhz)]
    return any(p.requests_per_s == cell.rate or (not p.feasible and p.requests_per_s < cell.rate) for p in here)


def _begin(output: Path, about: About) -> list[ProfilePoint]:
    """The points that the file holds; RequestError when they are of something else."""
    from powerd_policies.dynamollm import profile_file

    beside = output.with_suffix(".json")
    told: dict[str, Any] = asdict(about)
    if output.exists():
        try:
            before = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RequestError(f"{output} is there, but {beside} does not say what it is of", hint="choose another -o") from None
        if differs := [key for key in told if before.get(key) != told[key]]:
            was, now = before.get(differs[0]), told[differs[0]]
            raise RequestError(f"{output} is of {differs[0]} {was!r}, this is {now!r}", hint="choose another -o")
        text = output.read_text(encoding="utf-8")
        return list(profile_file.parse(text, str(output)).points) if len(text.strip().splitlines()) > 1 else []
    try:
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        output.write_text(HEAD + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {output}: {error.strerror}") from None
    return []


def _append(output: Path, point: ProfilePoint) -> None:
    from powerd_policies.dynamollm import profile_file
    from powerd_policies.dynamollm.profile import Profile

    with output.open("a", encoding="utf-8") as file:
        file.write(profile_file.dump(Profile([point])).split("\n", 1)[1])


def _tell(output: Path, label: str) -> None:
    from powerd_policies.dynamollm import profile_file

    rows = table(
        "class", ">clock", ">load", ">energy per request", ">TTFT p99", ">TBT p99", ">power", "in SLO", title=f"{output}{label}"
    )
    for p in profile_file.load(output).points:
        rows.add_row(
            p.request_class, f"{p.clock_mhz} MHz", f"{p.requests_per_s:g}/s", f"{p.energy_per_request_j:.0f} J",
            f"{p.ttft_p99_s:.3f} s", f"{p.tbt_p99_s:.4f} s", f"{p.power_w:.0f} W", "yes" if p.feasible else "no",
        )  # fmt: skip
    console().print(rows)
    note(f"wrote {output} and {output.with_suffix('.json')}")
