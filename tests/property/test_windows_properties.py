"""Whatever the readings: a ledger never raises, intervals enclose their figure, neighbouring windows add up."""

from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.clock import NS
from powerd.energy import Track, figure
from powerd.model import EnergyMethod, Health, Reading

GPU = "GPU-00000000-0000-0000-0000-000000000001"

_steps = st.lists(
    st.tuples(
        st.integers(1, 30),  # tenths of a second since the last one
        st.sampled_from([Health.UP] * 8 + [Health.LOST, Health.SUSPECT]),
        st.one_of(st.none(), st.integers(0, 700_000)),  # power
        st.one_of(st.none(), st.integers(-(10**6), 10**6)),  # counter step
        st.sampled_from([0] * 10 + [1]),  # epoch step
        st.one_of(st.none(), st.just(700_000)),  # limit
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps=_steps, method=st.sampled_from(EnergyMethod), cuts=st.tuples(*[st.floats(0, 1)] * 3))
def test_ledger_is_sound_for_any_readings(
    steps: list[tuple[int, Health, int | None, int | None, int, int | None]], method: EnergyMethod, cuts: tuple[float, ...]
) -> None:
    track = Track()
    now, counter, seen, epoch = 100 * NS, 10**7, 100 * NS, 1
    start = now
    for tenths, health, power, step, new_epoch, limit in steps:
        now += tenths * NS // 10
        epoch += new_epoch
        if step is not None:
            counter, seen = max(0, counter + step), now
        track.add(
            Reading(
                GPU, now, health, epoch, None if step is None and tenths > 15 else counter, seen, power,
                power_limit_enforced_mw=limit, energy_method=method,
            )
        )  # fmt: skip
    a, b, c = sorted(start + round(cut * (now - start)) for cut in cuts)
    edges = [track.edge(at) for at in (a, b, c)]
    parts = [figure(GPU, track, edges[i], edges[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    for part in parts:
        if part.energy_j is None:
            assert part.low_j is None
            assert part.high_j is None
            assert part.note
            continue
        assert part.low_j is not None
        assert part.high_j is not None
        assert 0 <= part.low_j <= part.energy_j <= part.high_j
    first, second, whole = (p.energy_j for p in parts)
    if first is not None and second is not None and whole is not None:
        assert abs(first + second - whole) <= 1e-6 * (1 + whole)


@settings(max_examples=100, deadline=None)
@given(
    watts=st.lists(st.integers(30, 700), min_size=40, max_size=80),
    refresh=st.sampled_from([20, 50, 100]),
    phase=st.integers(0, 99),
    begin=st.integers(1500, 2500),
    length=st.integers(100, 1400),
)
def test_constant_pieces_of_power_are_covered(watts: list[int], refresh: int, phase: int, begin: int, length: int) -> None:
    """Power may be anything that changes every 100 ms: far wilder than a GPU, so only the physical bounds are asserted."""
    track = Track()

    def true_mj(ms: float) -> float:
        whole, rest = divmod(ms, 100)
        return sum(watts[: int(whole)]) * 100 + watts[min(int(whole), len(watts) - 1)] * rest

    for tick in range(1, len(watts)):
        now_ms = tick * 100
        refreshed = (now_ms - phase) // refresh * refresh + phase
        track.add(
            Reading(
                GPU, now_ms * 10**6, Health.UP, 1, int(true_mj(max(0, refreshed))), now_ms * 10**6, watts[tick] * 1000,
                power_limit_enforced_mw=700_000,
            )
        )  # fmt: skip
    end = min(begin + length, (len(watts) - 3) * 100)
    result = figure(GPU, track, track.edge(begin * 10**6), track.edge(end * 10**6))
    assert result.energy_j is not None
    true_j = (true_mj(end) - true_mj(begin)) / 1000
    # Each edge may be off by at most one refresh and one sample at the highest power.
    assert abs(result.energy_j - true_j) <= 2 * 0.2 * max(watts)
