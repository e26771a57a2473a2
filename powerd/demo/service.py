"""The serving part of the demonstration: one node answers ten minutes of real conversations, as SinglePool and as DynamoLLM.

House rules: both policies get the same requests over HTTP, the same engines and the same powerd; time is stepped, so that the
figures are not the machine's; energy is what powerd's windows measured; every number says simulated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powerd.cli.output import console, table
from powerd.demo.children import Child, DemoError
from powerd.demo.perseus import Saving, saving
from powerd.demo.stage import START_S, stage
from powerd.demo.training import Energy

MODULE = "powerd_integrations.simulated_service"
MODEL = "h100-sxm"
GPUS = 8  # SinglePool is one instance of tensor parallelism 8
POLICIES = {"singlepool": "SinglePool", "dynamollm": "DynamoLLM"}
PATIENCE_S = 60.0  # real, without a word of the service


@dataclass
class Served:
    """What one policy made of the trace."""

    name: str
    energy: Energy
    seconds: float
    requests: list[dict[str, Any]]
    outcomes: dict[str, int]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Requests without a whole answer, whatever the reason."""
        return sum(1 for request in self.requests if not request["complete"])

    @property
    def within_slo(self) -> float:
        """Share of all requests."""
        return sum(1 for request in self.requests if request["within_slo"]) / len(self.requests)

    def quantile_s(self, what: str, share: float) -> float:
        """A quantile of the requests' TTFT or TBT; DemoError when nobody had one."""
        values = sorted(request[what] for request in self.requests if request[what] is not None)
        if not values:
            raise DemoError(f"{self.name}: no request has a {what}")
        return float(values[min(len(values) - 1, int(share * len(values)))])

    @property
    def fleets(self) -> str:
        """The fleets that served, in order of their appearance."""
        texts = (" + ".join(f"{count} x TP{tp}" for tp, count in sample["fleet"].items()) for sample in self.samples)
        return ", ".join(dict.fromkeys(text for text in texts if text))

    @property
    def clock_mhz(self) -> float | None:
        """Mean over time of the mean SM clock of GPUs with a replica."""
        clocks = [float(sample["clock_mhz"]) for sample in self.samples if sample["clock_mhz"] is not None]
        return sum(clocks) / len(clocks) if clocks else None


def serve(out: Path, seconds: float = 600.0, clocks: str = "plan") -> dict[str, Any]:
    """Run it, print it, draw it; the figures as plain data. DemoError when a policy does not serve the whole trace.

    ``clocks``: who holds those of DynamoLLM, its plan or the daemon's instance manager by what each engine's page says.
    """
    from powerd.demo.servicepicture import draw

    print(f"\nServing: Llama-2-70B on {GPUS} H100, {seconds:.0f} s of a conversation trace over HTTP, as SinglePool (all GPUs"
          " one instance\nat full clock) and as DynamoLLM. Engines and watts are modelled,"
          " all numbers below are simulated.")  # fmt: skip
    began_s = time.monotonic()
    with stage(GPUS, "stepped", latency=1.0, fit_on=None, model=MODEL) as here:
        child = here.start("service", "-m", MODULE, "--ask", "--seconds", str(seconds), "--policies", ",".join(POLICIES),
                           "--clocks", clocks)  # fmt: skip
        setting = child.next(START_S)
        here.go()
        child.tell("go")
        served = _follow(child, setting["requests"])
    simulated_s = sum(policy.seconds for policy in served)
    real_s = time.monotonic() - began_s
    print(f"Stepped time: {simulated_s:.0f} simulated seconds of service in {real_s:.0f} s, starting powerd included:"
          f" factor {simulated_s / real_s:.0f}.")  # fmt: skip
    found = _tell(setting, served)
    draw([out / "service.svg", out / "service.png"], served, setting)
    return found


def _follow(child: Child, requests: int) -> list[Served]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    found: list[Served] = []
    samples: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:55}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = None
        while "done" not in (message := child.next(PATIENCE_S)):
            if "served" in message:
                found.append(_served(message["served"], samples))
                if task is not None:
                    bar.update(task, completed=requests)
                samples, task = [], None
                continue
            samples.append(message)
            if task is None:
                task = bar.add_task("", total=requests)
            name, fleet = POLICIES[message["policy"]], " + ".join(f"{n} x TP{tp}" for tp, n in message["fleet"].items())
            said = f"{name}: {fleet}, {message['clock_mhz'] or 0:.0f} MHz, {message['power_w'] or 0:.0f} W (simulated)"
            bar.update(task, completed=message["answered"], description=said)
    if [policy.name for policy in found] != list(POLICIES.values()):
        raise DemoError(f"not every policy has served: {child.last_words()}")
    return found


def _served(told: dict[str, Any], samples: list[dict[str, Any]]) -> Served:
    values = [told[name] for name in ("energy_j", "energy_low_j", "energy_high_j")]
    if None in values:
        raise DemoError(f"{told['policy']}: no energy was measured")
    return Served(
        POLICIES[told["policy"]], Energy(*values), told["seconds"], told["seen"], told["outcomes"], told["events"], samples
    )


def _tell(setting: dict[str, Any], served: Sequence[Served]) -> dict[str, Any]:
    ttft, rate = setting["ttft_s"], setting["requests"] / setting["seconds"]
    heads = ("fleet", ">SM clock", ">energy", ">per request", ">mean power", ">TTFT p50", ">p99", ">TBT p99", ">in SLO", ">lost")
    rows = table("", *heads, title=f"{setting['requests']} requests, {rate:.2f}/s (simulated)")  # fmt: skip
    for policy in served:
        joules = policy.energy.energy_j
        rows.add_row(
            policy.name, policy.fleets, f"{policy.clock_mhz or 0:.0f} MHz", f"{joules / 1000:.0f} kJ",
            f"{joules / len(policy.requests):.0f} J", f"{joules / policy.seconds:.0f} W",
            *(f"{policy.quantile_s(what, q):.3f} s" for what, q in (("ttft_s", 0.5), ("ttft_s", 0.99), ("tbt_p99_s", 0.99))),
            f"{policy.within_slo:.2%}", str(policy.lost),
        )  # fmt: skip
    print()
    console().print(rows)
    print(f"\nSLO: first token within {ttft['S']:g} s for short and medium prompts and {ttft['L']:g} s for long ones,"
          f" 99 of 100 gaps between tokens within {setting['tbt_s']:g} s (simulated).\nEnergy is of all {setting['gpus']} GPUs;"
          " those without a replica draw their idle power (simulated).\n"
          "This SLO is wider than the published one, and load and SLO were chosen; benchmarks/results.md has the published SLO"
          " and the best fixed fleet.")  # fmt: skip
    before, after = served
    for event in after.events:
        if event["kind"] in ("scale", "reconfigured"):
            print(f"  DynamoLLM at {event['at_s']:5.0f} s: {event['kind']}: {event['detail']} (simulated)")
    saved: Saving = saving(before.energy, after.energy)
    lost = before.lost + after.lost
    print(f"\nDynamoLLM saves {saved} of the energy; in SLO: SinglePool {before.within_slo:.2%},"
          f" DynamoLLM {after.within_slo:.2%}; lost requests = {lost} (simulated)")  # fmt: skip
    return {
        "requests": setting["requests"], "requests_per_s": rate, "ttft_s": ttft, "tbt_s": setting["tbt_s"],
        "model": setting["model"], "modelled": setting["origin"], "lost": lost,
        "saving": {"saving": saved.saving, "low": saved.low, "high": saved.high},
        "policies": {policy.name: _plain(policy) for policy in served},
    }  # fmt: skip


def _plain(policy: Served) -> dict[str, Any]:
    return {
        "energy_j": policy.energy.energy_j, "low_j": policy.energy.low_j, "high_j": policy.energy.high_j,
        "seconds": policy.seconds, "fleets": policy.fleets, "mean_clock_mhz": policy.clock_mhz,
        "ttft_p50_s": policy.quantile_s("ttft_s", 0.5),
        "ttft_p99_s": policy.quantile_s("ttft_s", 0.99), "tbt_p99_s": policy.quantile_s("tbt_p99_s", 0.99),
        "within_slo": policy.within_slo, "lost": policy.lost, "outcomes": policy.outcomes, "events": policy.events,
    }  # fmt: skip
