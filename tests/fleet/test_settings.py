"""A fleet's file: what is wrong with it is said, with the nearest right name; and every shipped policy can be named in it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from powerd.client import Client
from powerd.errors import RequestError
from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.__main__ import controller, main
from powerd_integrations.fleet.policy import build
from powerd_integrations.ray_serve.node import NodeLease
from powerd_policies.dynamollm.classes import NAMES, Slo
from powerd_policies.dynamollm.fleet import ClassLoad, FleetState
from powerd_policies.dynamollm.knobs import POLICIES
from powerd_policies.dynamollm.predictor import DAY_S

MODEL = Path(__file__).resolve().parents[2] / "policies" / "profiles" / "llm" / "llama2-70b_h100.engine.csv"
GOOD = f"""\
[planner]
gpus = 96
engine_model = "{MODEL}"
policy = "POLICY"

[[groups]]
pool = "LL"
tp = 8
max_replicas = 12

[classes.ttft_s]
SS = 0.5
"""


ALL_POOLS = "".join(f'[[groups]]\npool = "{name}"\ntp = 8\nmax_replicas = 12\n' for name in NAMES if name != "LL")


@pytest.mark.parametrize("policy", [*POLICIES])
def test_every_policy_decides_a_fleet(policy: str) -> None:
    settings = configured.parse(GOOD.replace("POLICY", policy) + ALL_POOLS)
    plan = build(settings).decide(FleetState(0.0, 0.0, (), {}, 96))
    assert plan.instances
    assert set(plan.routes) == {"SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"}


def test_options_of_a_policy_and_a_fixed_fleet() -> None:
    fleet = build(configured.parse(GOOD.replace("POLICY", "dynamollm") + "[policy]\npool_s = 60\n"))
    assert fleet.knobs.pool_s == 60  # type: ignore[attr-defined]
    assert fleet.knobs.partitions == ("one",)  # type: ignore[attr-defined]
    fixed = build(configured.parse(GOOD.replace("POLICY", "static") + "[policy]\ntp = 8\ncount = 3\nclock_mhz = 1980\n"))
    wants = fixed.decide(FleetState(0.0, 0.0, (), {}, 96)).instances
    assert [(want.tp, want.clock_mhz) for want in wants] == [(8, 1980)] * 3


def test_periods_and_forecasts_are_the_users() -> None:
    text = GOOD.replace("POLICY", "dynamollm").replace("gpus = 96", "gpus = 96\nstart_s = 5")
    text += "[policy]\nperiod_s = 1\npool_s = 6\ncluster_s = 12.5\nbudget_w = 9000\n[policy.weights]\ngpu = 20\n"
    fleet = cast(Any, build(configured.parse(text + "[forecast]\nlevel_s = 30\n")))
    knobs, forecast = fleet.knobs, fleet.predictor.knobs
    assert (fleet.period_s, knobs.pool_s, knobs.cluster_s, knobs.budget_w, knobs.weights.gpu) == (1, 6, 12.5, 9000, 20.0)
    assert (forecast.level_s, forecast.peak_s) == (30.0, 120.0), "what the file does not say is as in a replay"
    assert (fleet.lead_s, fleet.overheads.reshard_s(8, 4)) == (5.0, 5.0), "another parallelism is a start of new replicas"


def test_the_planner_knows_the_day_of_the_week() -> None:
    """Its clock counts from the machine's start, and weekends differ from weekdays."""
    predictor = cast(Any, controller(configured.parse(GOOD.replace("POLICY", "dynamollm")))).predictor
    booted_unix_s = time.time() - time.monotonic()
    monday_s = datetime(2026, 11, 16, tzinfo=UTC).timestamp() - booted_unix_s
    hours = [(monday_s + 3600.0 * (n + 1), 3600.0, 36_000 if n < 5 * 24 else 3_600) for n in range(7 * 24)]
    predictor.learn((at_s, window_s, {"MM": ClassLoad(n, 500 * n, 200 * n)}) for at_s, window_s, n in hours)

    def at_noon(day: int) -> float:
        noon_s = monday_s + (7 + day) * DAY_S + DAY_S / 2
        return float(predictor.peak(noon_s, noon_s + 600.0)["MM"].requests_per_s)

    assert at_noon(4) == pytest.approx(10.5), "Friday, with the headroom of forecasts"
    assert at_noon(5) == pytest.approx(1.05), "Saturday"


def test_slos_are_those_of_the_class_or_of_all_classes_by_their_prompts() -> None:
    settings = configured.parse(GOOD)
    assert settings.slo_of(settings.groups[0]) == (Slo(2.0, 0.1), {255: 0.25, 1023: 0.4}), "shorter prompts may come to it"
    other = configured.parse(GOOD.replace('pool = "LL"', 'pool = "everything"\ntbt_s = 0.2'))
    slo, classes = other.slo_of(other.groups[0])
    assert (slo, classes[255]) == (Slo(2.0, 0.2), 0.25), "the TTFT of SM for short prompts, and its own TBT"
    own = configured.parse(GOOD.replace('pool = "LL"', 'pool = "everything"\nttft_s = 0.3'))
    assert own.slo_of(own.groups[0]) == (Slo(0.3, 0.1), {})


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("gpus = 96", "gpu = 96", "[planner]: unknown 'gpu'; the nearest is 'gpus'"),
        ("gpus = 96", "", "[planner]: gpus is missing"),
        ("gpus = 96", "gpus = 0", "[planner] gpus: from 1"),
        ("gpus = 96", "gpus = true", "[planner] gpus: a whole number, not True"),
        ("gpus = 96", "gpus = 96\nsettle_s = 0", "[planner] settle_s: above 0"),
        ("gpus = 96", "gpus = 96\nwave_ratio = 2", "[planner] wave_ratio: above 0, at most 1"),
        ("[[groups]]", "[[group]]", "unknown 'group'; the nearest is 'groups'"),
        ("tp = 8", "tp = 0", "[[groups]] LL-tp0: tp from 1"),
        ("tp = 8", "tp = '8'", "[[groups]] 1 tp: a whole number, not '8'"),
        ("max_replicas = 12", "max_replicas = 2\nmin_replicas = 3", "min_replicas at most max_replicas"),
        ("SS = 0.5", "XX = 0.5", "unknown 'XX'"),
        ("SS = 0.5", "SS = 0", "SS: seconds above 0"),
        ("SS = 0.5", "SS = '1'", "ttft_s: a number, not '1'"),
        ("[classes.ttft_s]", "[classes]\nprompt_bounds = [256, 128, 8193]\n[classes.ttft_s]", "prompt_bounds: 3 rising numbers"),
        ("[classes.ttft_s]", "[engine]\ncommand = ['x']\nurl = 'http://y'\n[classes.ttft_s]", "not both"),
        ("[planner]", "[planner", "line 1"),
    ],
)
def test_what_is_wrong_is_said(right: str, wrong: str, said: str) -> None:
    with pytest.raises(RequestError) as error:
        configured.parse(GOOD.replace(right, wrong), "fleet.toml")
    assert said in str(error.value)
    assert str(error.value).startswith("fleet.toml")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (GOOD.replace("POLICY", "dynamo"), "there is no policy 'dynamo'; there are singlepool"),
        (GOOD.replace("POLICY", "dynamollm") + "[policy]\npol_s = 1\n", "[policy]: unknown 'pol_s'; the nearest is 'pool_s'"),
        (GOOD.replace("POLICY", "dynamollm") + "[policy]\npool_s = '60'\n", "[policy] pool_s: a number, not '60'"),
        (GOOD.replace("POLICY", "dynamollm") + "[policy]\npool_s = -60\n", "pool_s: a number from 0, not -60"),
        (GOOD.replace("POLICY", "dynamollm") + "[forecast]\nlevels = 1\n", "[forecast]: unknown 'levels'; the nearest is"),
        (GOOD.replace("POLICY", "dynamollm") + "[forecast]\nbin_s = 0\n", "division"),
        (GOOD.replace("POLICY", "static") + "[policy]\ntp = 3\ncount = 1\nclock_mhz = 1980\n", "holds no TP3"),
        (GOOD.replace("POLICY", "multipool"), "no partition has all its pools among the [[groups]]: nine needs SS, SM, SL"),
        (GOOD.replace("POLICY", "dynamollm") + "[policy]\npartitions = ['two']\n", "there is no partition 'two'"),
        (GOOD.replace("POLICY", "dynamollm").replace("tp = 8", "tp = 4"), "dynamollm needs tensor parallelism 8"),
        (GOOD.replace("POLICY", "dynamollm").replace("tp = 8", "tp = 16"), "tp 16: the figures of llama2-70b_h100 hold TP2"),
        (GOOD.replace("POLICY", "dynamollm").replace(str(MODEL), "/none.csv"), "cannot read the engine model /none.csv"),
        (GOOD.replace("POLICY", "dynamollm").replace("gpus", "listen = 'x'\ngpus"), "listen: an address as 127.0.0.1:9480"),
    ],
)
def test_a_policy_that_cannot_be_ends_the_planner_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str, said: str
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(changed)
    assert main([str(file)]) == 78
    assert said in capsys.readouterr().err


def test_a_good_file_is_said_to_be_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(GOOD.replace("POLICY", "dynamollm"))
    assert main([str(file), "--check"]) == 0
    assert capsys.readouterr().out == f"{file}: dynamollm every 5 s over LL-tp8\n"


@pytest.mark.parametrize("more", ['"--max-num-batched-tokens=512"', '"--max-num-batched-tokens", "512"',
                                  '"--max-num-batched-tokens={chunk_tokens}"'])  # fmt: skip
def test_an_engine_with_the_chunk_that_powerd_counts_with_is_taken(more: str) -> None:
    assert configured.parse(GOOD + f'[engine]\ncommand = ["/opt/v/bin/vllm", "serve", "m", {more}]\n').engine.chunk_tokens == 512


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ('"vllm", "serve", "m"', "lacks --max-num-batched-tokens=512"),
        ('"python", "-m", "vllm.entrypoints.openai.api_server"', "lacks --max-num-batched-tokens=512"),
        ('"vllm", "serve", "m", "--max-num-batched-tokens=8192"', "says --max-num-batched-tokens=8192, powerd counts with"),
        ('"python", "-m", "sglang.launch_server", "--chunked-prefill-size", "-1"', "says --chunked-prefill-size=-1"),
    ],
)
def test_an_engine_with_another_chunk_or_none_is_refused(command: str, said: str) -> None:
    """Its gaps would be longer than the clocks that powerd chooses allow for."""
    with pytest.raises(RequestError, match=said):
        configured.parse(GOOD + f"[engine]\ncommand = [{command}]\n")


def test_the_policy_counts_with_the_engines_chunk() -> None:
    fleets = [
        build(configured.parse(GOOD.replace("POLICY", "dynamollm") + f"[engine]\nchunk_tokens = {n}\n")) for n in (512, 640)
    ]
    assert [fleet.capacity.chunk_tokens for fleet in fleets] == [512, 640]  # type: ignore[attr-defined]


def test_the_nodes_powerd_is_told_the_engines_chunk_and_slo(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(Client, "register_replica", lambda _, name, **said: told.update(said, name=name))
    settings = configured.parse(GOOD.replace("POLICY", "dynamollm") + "[engine]\nchunk_tokens = 640\n")
    NodeLease(settings, settings.groups[0], "LL-tp8-1", "http://127.0.0.1:1/metrics")
    assert (told["name"], told["tp"], told["chunk_tokens"]) == ("LL-tp8-1", 8, 640)
    assert (told["ttft_s"], told["tbt_s"]) == (2.0, 0.1)


def test_priorities_for_an_engine_that_was_not_started_to_go_by_them_are_refused() -> None:
    engine = '[engine]\npriorities = true\ncommand = ["vllm", "serve", "m", "--max-num-batched-tokens=512"{more}]\n'
    with pytest.raises(RequestError, match="--scheduling-policy=priority"):
        configured.parse(GOOD + engine.replace("{more}", ""))
    assert configured.parse(GOOD + engine.replace("{more}", ', "--scheduling-policy=priority"')).engine.priorities
