"""Whatever crashes, and whatever happens to the journal's bytes: recovery ends at baseline, never at powerd's own value."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerd.errors import DeviceError
from powerd.hw import journal as journals
from powerd.hw.fence import StaleGenerationError
from powerd.hw.journal import CAPACITY_BYTES, FILE_NAME, RECORD_BYTES, Journal
from powerd.model import Control, Interval
from tests.property.hw_memory import BOOT, DEFAULT_MW, LOAD, Died, HandClock, Hands, MemoryGpu, config, place

FOUND_MW = 550_000  # what the admin had set before powerd came
values = {
    Control.POWER_LIMIT: st.integers(200, 540).map(lambda w: Interval(w * 1000, w * 1000)),
    Control.SM_CLOCK: st.integers(210, 1900).map(lambda c: Interval(c, c)),
    Control.MEMORY_CLOCK: st.just(Interval(1593, 1593)),
}
tables = st.fixed_dictionaries({}, optional=values)
steps = st.lists(st.tuples(st.integers(0, 1), tables), min_size=1, max_size=6)


def gpus() -> list[MemoryGpu]:
    return [MemoryGpu(0, limit_mw=FOUND_MW), MemoryGpu(1, limit_mw=FOUND_MW)]


def recovered(nodes: list[MemoryGpu], directory: Path, clock: HandClock) -> Hands:
    for gpu in nodes:
        gpu.crash_after = None
    hands = Hands(nodes, directory, config(), clock)
    hands.settle()
    return hands


@settings(max_examples=25, deadline=None)
@given(steps, st.integers(0, 12))
def test_any_crash_inside_the_driver_then_recovery_is_baseline(
    todo: list[tuple[int, dict[Control, Interval]]], after: int
) -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        nodes[0].crash_after = after
        with suppress(Died):
            for gpu, table in todo:
                hands.want(gpu, dict(table))
                hands.settle()
        hands.journal.close()
        recovered(nodes, directory, clock)
        assert [g.state for g in nodes] == [(FOUND_MW, None, None)] * 2


@settings(max_examples=25, deadline=None)
@given(steps, st.data())
def test_any_damage_to_the_journal_ends_at_baseline_or_the_rule(
    todo: list[tuple[int, dict[Control, Interval]]], data: st.DataObject
) -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        for gpu, table in todo:
            hands.want(gpu, dict(table))
            hands.settle()
        touched = set(hands.journal.touched())
        hands.journal.close()
        file = directory / FILE_NAME
        content = bytearray(file.read_bytes())
        used = len(bytes(content).rstrip(b"\0"))
        if data.draw(st.booleans(), label="cut"):
            del content[data.draw(st.integers(0, used), label="at") :]
        else:
            at = data.draw(st.integers(0, used - 1), label="at")
            content[at] ^= data.draw(st.integers(1, 255), label="bits")
        file.write_bytes(content)
        after = recovered(nodes, directory, clock)
        assert after.journal.recovered.damaged
        assert after.journal.recovered.quarantined is not None
        for one in nodes:
            assert one.limit_mw in (FOUND_MW, DEFAULT_MW)
            assert (one.sm, one.memory) == (None, None)
        assert after.journal.touched() == []
        assert touched or all(g.sm is None for g in nodes)


@settings(max_examples=25, deadline=None)
@given(steps)
def test_applying_twice_is_applying_once(todo: list[tuple[int, dict[Control, Interval]]]) -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        for seq, (gpu, table) in enumerate(todo):
            hands.want(gpu, dict(table), seq)
            hands.settle()
            hands.observe(gpu)
            state, calls = nodes[gpu].state, len(nodes[gpu].calls)
            hands.want(gpu, dict(table), seq + 100)
            hands.settle()
            assert (nodes[gpu].state, len(nodes[gpu].calls)) == (state, calls)
            answered = {o.control for o in hands.outcomes if o.seq == seq + 100}
            assert answered >= set(table)


@settings(max_examples=25, deadline=None)
@given(steps)
def test_what_is_set_is_what_the_last_table_says_and_the_rest_is_baseline(
    todo: list[tuple[int, dict[Control, Interval]]],
) -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        last: list[dict[Control, Interval]] = [{}, {}]
        for gpu, table in todo:
            hands.want(gpu, dict(table))
            hands.settle()
            last[gpu] = table
        for one, table in zip(nodes, last, strict=True):
            limit = table.get(Control.POWER_LIMIT)
            assert one.limit_mw == (limit.high if limit else FOUND_MW)
            clock_wish = table.get(Control.SM_CLOCK)
            assert (one.sm is None) == (clock_wish is None)
            if one.sm and clock_wish:
                assert clock_wish.high - 15 < one.sm.high <= max(210, clock_wish.high)
            assert one.memory == table.get(Control.MEMORY_CLOCK)


limits = st.tuples(st.integers(1, 2000), st.integers(1, 2000), st.integers(200, 700), st.integers(200, 700))


@settings(max_examples=50, deadline=None)
@given(tables, st.lists(limits, min_size=1, max_size=3))
def test_after_any_reload_what_is_set_is_within_the_sites_limits_or_baseline(
    table: dict[Control, Interval], reloads: list[tuple[int, int, int, int]]
) -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        hands.want(0, dict(table), dwell_ns=10**15)
        hands.settle()
        for clock_a, clock_b, watts_a, watts_b in reloads:
            low, high, least, most = min(clock_a, clock_b), max(clock_a, clock_b), min(watts_a, watts_b), max(watts_a, watts_b)
            before, calls = nodes[0].state, len(nodes[0].calls)
            hands.actuators[0].configure(
                config(
                    f"[hw]\nmin_dwell_s = 0\n[limits]\nsm_clock_min_mhz = {low}\nsm_clock_max_mhz = {high}\n"
                    f"power_limit_min_w = {least}\npower_limit_max_w = {most}"
                )
            )
            hands.settle()
            gpu = nodes[0]
            assert gpu.sm is None or low <= gpu.sm.low <= gpu.sm.high <= high
            assert gpu.sm is None or Control.SM_CLOCK in table
            assert least * 1000 <= gpu.limit_mw <= most * 1000 or Control.POWER_LIMIT not in table
            if gpu.state == before:
                assert len(gpu.calls) == calls
        hands.want(0, {})
        hands.actuators[0].configure(config())
        hands.settle()
        assert nodes[0].state == (FOUND_MW, None, None)


def test_one_gpu_that_refuses_does_not_keep_another_from_baseline() -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        for gpu in (0, 1):
            hands.want(gpu, {Control.POWER_LIMIT: Interval(300_000, 300_000), Control.SM_CLOCK: Interval(900, 900)})
        hands.settle()
        nodes[0].fail = DeviceError("unknown", code="internal", nvml_code=999)
        hands.want(0, {})
        hands.want(1, {})
        hands.settle()
        assert nodes[1].state == (FOUND_MW, None, None)
        assert nodes[0].state[0] == 300_000
        nodes[0].fail = None
        hands.settle()
        assert nodes[0].state == (FOUND_MW, None, None)


def test_an_old_worker_may_not_write_after_a_new_one_has_begun() -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        old = Hands(nodes, directory, config(), clock)
        Hands(nodes, directory, config(), clock)
        old.want(0, {Control.POWER_LIMIT: Interval(300_000, 300_000)})
        with pytest.raises(StaleGenerationError):
            old.actuators[0].step()
        assert nodes[0].calls == []


def test_a_journal_of_another_driver_load_or_boot_is_discarded_and_nothing_is_touched() -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        hands.want(0, {Control.POWER_LIMIT: Interval(300_000, 300_000)})
        hands.settle()
        hands.journal.epoch(nodes[0].gpu.uuid, 7, 1234)
        hands.journal.close()
        nodes[0].limit_mw, nodes[0].calls = DEFAULT_MW, []  # what a driver load does
        after = Hands(nodes, directory, config(), clock, load=b"N" * 16)
        after.settle()
        assert after.journal.recovered.stale
        assert nodes[0].calls == []
        assert after.journal.recovered.epochs == {nodes[0].gpu.uuid: (7, 1234)}  # epochs go on rising


def test_a_journal_of_the_schema_before_is_read() -> None:
    with place() as directory:
        nodes, clock = gpus(), HandClock()
        hands = Hands(nodes, directory, config(), clock)
        hands.want(0, {Control.POWER_LIMIT: Interval(300_000, 300_000)})
        hands.settle()
        hands.journal.close()
        file = directory / FILE_NAME
        content = bytearray(file.read_bytes())
        header = bytes(content[:RECORD_BYTES])
        kind, _, generation, boot, load = journals._HEADER.unpack_from(header)
        content[:RECORD_BYTES] = journals._seal(journals._HEADER.pack(kind, journals.SCHEMA - 1, generation, boot, load))
        file.write_bytes(content)
        assert not recovered(nodes, directory, clock).journal.recovered.damaged
        assert nodes[0].limit_mw == FOUND_MW
        content[:RECORD_BYTES] = journals._seal(journals._HEADER.pack(kind, 99, generation, boot, load))
        file.write_bytes(content)
        assert "schema 99" in Journal(directory, LOAD, 9, {}, BOOT).recovered.damaged


def test_the_journal_compacts_and_keeps_what_counts() -> None:
    with place() as directory:
        uuid = MemoryGpu(0).gpu.uuid
        journal = Journal(directory, LOAD, 1, {}, BOOT)
        for n in range(3 * CAPACITY_BYTES // RECORD_BYTES):
            value = Interval(200_000 + n, 200_000 + n)
            if n % 50 == 0:
                journal.intend(uuid, Control.POWER_LIMIT, Interval(FOUND_MW, FOUND_MW), value)
            journal.done(uuid, Control.POWER_LIMIT, value)
        journal.close()
        assert (directory / FILE_NAME).stat().st_size == CAPACITY_BYTES
        assert (directory / FILE_NAME).stat().st_mode & 0o777 == 0o600
        found = Journal(directory, LOAD, 2, {}, BOOT).recovered
        assert not found.damaged
        assert found.entries[uuid, Control.POWER_LIMIT].baseline == Interval(FOUND_MW, FOUND_MW)
        assert found.entries[uuid, Control.POWER_LIMIT].intent == value


def test_a_link_in_the_journals_place_is_not_followed() -> None:
    with place() as directory:
        victim = directory / "victim"
        victim.write_text("untouched")
        (directory / FILE_NAME).symlink_to(victim)
        journal = Journal(directory, LOAD, 1, {}, BOOT)
        assert journal.recovered.damaged
        assert victim.read_text() == "untouched"
        assert not (directory / FILE_NAME).is_symlink()
