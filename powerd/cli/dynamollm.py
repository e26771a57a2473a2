"""``powerctl dynamollm``: replay a trace under policies, profile an endpoint. Solvers are imported when a command needs them.

House rules: a replay is the simulator's, words and pictures are ours; a report is on disk before anything is said about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerd.cli import dynamollm_profile
from powerd.cli.context import JsonFlag, note, write_text
from powerd.cli.output import console, progress
from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd.sim.replay.trace import Trace

app = typer.Typer(
    help="DynamoLLM: replicas, tensor parallelism and clocks under latency targets.", no_args_is_help=True, rich_markup_mode=None
)

DAYS_MOST = 28.0

app.command("profile", no_args_is_help=True)(dynamollm_profile.profile)


@app.command("replay", no_args_is_help=True)
def replay(
    trace_path: Annotated[
        Path, typer.Option("--trace", metavar="CSV", help="TIMESTAMP,ContextTokens,GeneratedTokens, sorted by time; .gz is read.")
    ],
    scenario_path: Annotated[
        Path | None, typer.Option("--scenario", metavar="TOML", help="Cluster, promises, costs; default: the reference scenario.")
    ] = None,
    names: Annotated[
        str, typer.Option("--policies", metavar="LIST", help="Comma separated; the first is what savings are against.")
    ] = "singlepool,beststatic,dynamollm",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="JSON", help="Where the report goes.")] = None,
    picture: Annotated[
        list[Path] | None, typer.Option("--plot", metavar="FILE", help="A picture (.svg, .png); repeatable.")
    ] = None,
    history_path: Annotated[
        Path | None,
        typer.Option("--history", metavar="CSV", help="A trace of the weeks before, which forecasts may learn from."),
    ] = None,
    load: Annotated[
        float | None, typer.Option("--load", metavar="X", help="Times the trace's own load; default: the scenario's.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, max=64, help="Policies that run at a time.")] = 1,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every class's latencies, too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Replay a trace on a modelled cluster under several policies: energy, latency, cost side by side."""
    _libraries_or_hint()
    from powerd import plot
    from powerd.cli import replays
    from powerd.sim.replay import compare, policies, scale, session, trace

    for path in picture or []:
        plot.check(path)
    if not names.strip(", "):
        raise RequestError("no policies", hint=f"valid: {', '.join(policies.POLICIES)}", code="bad_value")
    chosen = session.chosen(names)
    scenario = session.scenario(scenario_path, load)

    def scaled(path: Path) -> Trace:
        return scale.scaled(trace.read(path), scenario.run.load, scenario.run.seed)

    comparison = session.prepare(scaled(trace_path), scenario, None if history_path is None else scaled(history_path))
    if comparison.workload.oversize:
        limit = scenario.classes.context_limit
        note(f"{comparison.workload.oversize} prompts are beyond the context limit of {limit} tokens: rejected")
    with ExitStack() as opened:
        bars: list[Callable[[int, int], None]] = []

        def told(done_s: float, total_s: float) -> None:
            if not bars:  # the bar has a thread: workers are forked before there is one
                bars.append(opened.enter_context(progress("replay")))
            bars[0](round(done_s), round(total_s))

        summaries = compare.compare(chosen, comparison, jobs, told)
    made = session.report(comparison, summaries)
    if output is not None:
        write_text(output, json.dumps(made, indent=1) + "\n")
    for path in picture or []:
        replays.draw(path, summaries, comparison.workload.trace.name)
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        screen = console()
        screen.print(replays.energy_table(made["policies"], _title(comparison.workload.trace, scenario.gpus), screen.width))
        if verbose:
            screen.print(replays.latency_table(made["policies"]))
    if written := [*filter(None, [output]), *(picture or [])]:
        note(f"wrote {', '.join(map(str, written))}")


def _title(trace: Trace, gpus: int) -> str:
    return f"{trace.name}, modelled: {len(trace)} requests in {trace.length_s / 3600:.4g} h on at most {gpus} GPUs"


@app.command("generate", no_args_is_help=True)
def generate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CSV", help="Where the trace goes; .csv.gz is compressed.")],
    days: Annotated[float, typer.Option("--days", metavar="N", help="Its length.")] = 1.0,
    requests_per_s: Annotated[float, typer.Option("--rate", metavar="X", help="Requests/s, mean over a week.")] = 5.5,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Decides everything.")] = 1,
    lengths: Annotated[
        Path | None, typer.Option("--lengths", metavar="CSV", help="A trace whose lengths are drawn; default: the shipped hour.")
    ] = None,
) -> None:
    """Write a trace of days or weeks with daily and weekly shape over the lengths of a real one; it begins on a Monday."""
    _libraries_or_hint()
    from powerd.sim.replay import generate, session, trace

    if not (0.0 < days <= DAYS_MOST and 0.0 < requests_per_s <= 10_000):
        raise RequestError(
            f"{days:g} days at {requests_per_s:g} requests/s", hint=f"at most {DAYS_MOST:g} days", code="bad_value"
        )
    shape = generate.Shape(requests_per_s=requests_per_s)
    made = generate.generate(trace.read(lengths or session.shipped_hour()), days * generate.DAY_S, seed, shape)
    trace.write(output, made)
    note(f"wrote {output}: {len(made)} requests")


def _libraries_or_hint() -> None:
    try:
        import numpy  # noqa: F401
        import scipy  # noqa: F401
    except ImportError:
        raise RequestError("replays need numpy and scipy", hint="pip install 'powerd[cli,plan,sim]'", code="bad_value") from None
