"""Engine models for tests: made-up ones that are quick to follow by hand, and one with figures of the size of real ones."""

from __future__ import annotations

from powerd.sim.cluster import Cluster, ClusterConfig, Requests
from powerd_policies.dynamollm.classes import NAMES, Classes, Slo
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel
from powerd_policies.dynamollm.fleet import FleetPlan, InstanceWant

EVERYONE = dict.fromkeys(NAMES, ("all",))


def simple(**changes: float) -> Coefficients:
    """10 ms fixed, 1 ms a request, 0.1 ms a prompt token."""
    figures = {
        "prefill_fixed_s": 0.005, "prefill_token_s": 1e-4, "decode_fixed_s": 0.01, "decode_request_s": 1e-3,
        "prefill_w": 600.0, "decode_w": 200.0, "decode_log2_w": 25.0, "idle_w": 100.0,
    }  # fmt: skip
    return Coefficients(**{**figures, **changes})


def toy() -> EngineModel:
    """TP1 and TP2 at two clocks: half the clock takes twice the time and half the watts; idle 100 and 60 W."""
    table = {}
    for tp in (1, 2):
        for mhz, slower in ((1000, 1.0), (500, 2.0)):
            table[tp, mhz] = simple(
                prefill_token_s=1e-4 * slower / tp, decode_fixed_s=0.01 * slower / tp, prefill_fixed_s=0.005 * slower,
                prefill_w=600 / slower, decode_w=200 / slower, idle_w=100 if mhz == 1000 else 60,
            )  # fmt: skip
    return EngineModel("toy", "paper", table, {1: 2000, 2: 5000}, 10**9, off_w=70.0, origin="made up")


def llama() -> EngineModel:
    """Llama-2-70B on H100 in size: measured decode and prefill times at full clock, all the rest assumed."""
    table = {}
    for tp, (fixed_ms, request_ms, token_ms) in {2: (39.1, 0.105, 0.3), 4: (28.7, 0.326, 0.15), 8: (29.7, 0.306, 0.1)}.items():
        for mhz in (1980, 1590, 1200, 810):
            slower = 1980 / mhz
            table[tp, mhz] = Coefficients(
                0.005, token_ms * 1e-3 * slower, fixed_ms * 1e-3 * (0.77 + 0.23 * slower), request_ms * 1e-3 * slower,
                90 + 600 / slower**2, 90 + 200 / slower**1.5, 20.0, 110.0,
            )  # fmt: skip
    return EngineModel("Llama-2-70B", "H100", table, {2: 19_000, 4: 450_000, 8: 1_400_000}, 140 * 10**9, origin="assumed")


def patient(ttft_s: float = 0.25) -> Classes:
    """Nine classes that were all promised the same, of prompts up to 200 tokens."""
    return Classes((20, 80, 201), (10, 30), {name: Slo(ttft_s, 0.1) for name in NAMES})


def fleet(*wants: tuple[str | None, int, int], pool: str = "all") -> FleetPlan:
    """A plan of one pool: (id, TP, MHz) of each instance."""
    return FleetPlan(tuple(InstanceWant(name, pool, tp, mhz) for name, tp, mhz in wants), EVERYONE)


def ran(requests: Requests, config: ClusterConfig | None = None, *, tp: int = 1, clock_mhz: int = 1000) -> Cluster:
    """A cluster of one toy instance that has its plan."""
    cluster = Cluster(toy(), requests, patient(), config or ClusterConfig(chunk_tokens=64, max_running=8), gpus=4)
    cluster.apply(fleet((None, tp, clock_mhz)))
    return cluster
