"""A small engine model for tests: figures of the right size, easy to compute with by hand."""

from __future__ import annotations

from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel

CLOCKS_MHZ = (1980, 1590, 1200)


def engine(tps: tuple[int, ...] = (2, 4, 8), clocks_mhz: tuple[int, ...] = CLOCKS_MHZ) -> EngineModel:
    """Prefill goes as 1/clock, a quarter of decode does; power rises with the square of the clock."""
    table = {}
    for tp in tps:
        for clock in clocks_mhz:
            x = clock / 1980
            slow = 0.75 + 0.25 / x
            table[tp, clock] = Coefficients(
                prefill_fixed_s=0.02,
                prefill_token_s=0.0008 / tp / x,
                decode_fixed_s=(0.024 + 0.03 / tp) * slow,
                decode_request_s=0.0002 * slow,
                prefill_w=150 + 500 * x * x,
                decode_w=140 + 180 * x * x,
                decode_log2_w=8 + 12 * x * x,
                idle_w=80 + 30 * x,
            )
    return EngineModel("test-70b", "H100", table, {tp: 60_000 * tp for tp in tps}, 140_000_000_000, origin="made up for tests")
