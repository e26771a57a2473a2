"""Line protocol: what rows become, and that no text of a user can become anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from powerd.api import LeaseView, WantSpec
from powerd.clock import NS
from powerd.jobs import JobRestored, JobRow
from powerd.model import Control, Event, Health, LeaseState, Reading, Snapshot, WantClass
from powerd.records import JobStepRow
from powerd.sinks.lines import OTHER, Guard, InferenceRow, Lines, line

UUID = "GPU-00000000-0000-0000-0000-000000000001"
T0 = 1_800_000_000


def snapshot(second: float, **fields: Any) -> Snapshot:
    ns = round((T0 + second) * NS)
    return Snapshot(0, ns, ns, (Reading(UUID, ns, Health.UP, 1, **fields),))


def lease(**changes: Any) -> LeaseView:
    view = LeaseView(
        "l1", LeaseState.ACTIVE, WantClass.LEASE, 7, "ada", 1, (UUID,), (WantSpec(Control.POWER_LIMIT, None, 300_000),), "why",
        None, False, 60.0, 60.0, 0.0,
    )  # fmt: skip
    return dataclasses.replace(view, **changes)


def fields_of(text: str) -> dict[str, str]:
    """The fields of a line that has no blank within a string."""
    return dict(pair.split("=", 1) for pair in text.split(" ")[1].split(","))


def every(values_per_day: int = 1000) -> Lines:
    return Lines("node1", sample_hz=10, every=True, values_per_day=values_per_day)


def test_a_reading_is_one_point_in_base_units_with_its_own_time() -> None:
    (text,) = every().snapshot(snapshot(0.5, power_mw=300_500, sm_clock_mhz=1410, energy_mj=12_345, clock_event_reasons=0x4))
    assert text.startswith(f"gpu,host=node1,uuid={UUID} ")
    assert text.endswith(f" {T0}500")
    fields = fields_of(text)
    assert fields["power_watts"] == "300.5"
    assert fields["sm_clock_hertz"] == "1410000000.0"
    assert fields["energy_joules"] == "12.345"
    assert fields["up"] == "1i"
    assert (fields["event_sw_power_cap_ratio"], fields["event_gpu_idle_ratio"]) == ("1.0", "0.0")


def test_what_is_unknown_is_left_out_and_never_zero() -> None:
    (text,) = every().snapshot(snapshot(0, power_mw=None))
    assert set(fields_of(text)) == {"up", "energy_epoch"}
    assert line("gpu", {}, {"power_watts": None, "ratio": float("nan"), "n": 1 << 63}, 1) is None


def test_at_a_lower_rate_a_point_is_the_mean_of_its_interval_and_the_last_of_its_counter() -> None:
    lines = Lines("node1", sample_hz=1, every=False)
    made = [
        text
        for tenth in range(20)
        for text in lines.snapshot(
            snapshot(tenth / 10, power_mw=1000 * tenth, energy_mj=1000 * tenth, clock_event_reasons=tenth & 4)
        )
    ]
    made += lines.finish()
    first, second = map(fields_of, made)
    assert (first["power_watts"], first["energy_joules"], first["event_sw_power_cap_ratio"]) == ("4.5", "9.0", "0.4")
    assert (second["power_watts"], second["energy_joules"]) == ("14.5", "19.0")
    assert made[0].endswith(f"{T0}900")


def test_a_field_keeps_its_type_whatever_number_comes() -> None:
    lines = every()
    rows = [InferenceRow("p", T0 * NS + n * NS, ttft_p99_s=value, replicas=2) for n, value in enumerate((1, 1.5))]
    assert [fields_of(lines.inference(row)[0])["ttft_p99_seconds"] for row in rows] == ["1.0", "1.5"]
    assert fields_of(lines.inference(rows[0])[0])["replicas"] == "2i"


@pytest.mark.parametrize(
    "text", ['a b,c=d "e" \\', "x\ny", "gpu,host=evil power_watts=1 1\n", "\\", "a\\,", "=", "#", "\x00\r\n", "ü 漢字 \ud800"]
)
def test_no_text_can_end_a_line_or_forge_another_one(text: str) -> None:
    lines = every()
    made = [
        *lines.lease(T0 * NS, lease(reason=text, job=text, user=text)),
        *lines.event(Event(1, 0, T0 * NS, "k", text, text, text, {"x": text})),
        *lines.job(T0 * NS, JobStepRow(text, 0, 1, 0, 0, 1, 1.0, None, None, text, (UUID,))),
    ]
    assert len(made) == 3
    for one in made:
        assert "\n" not in one
        assert one.encode().decode().isprintable()


def test_a_job_name_beyond_the_days_number_is_other_and_counted() -> None:
    lines = Lines("node1", sample_hz=1, every=True, values_per_day=2)
    tags = [lines.lease((T0 + n) * NS, lease(job=f"job{n}"))[0].split(" ")[0].rpartition("job=")[2] for n in range(4)]
    assert tags == ["job0", "job1", OTHER, OTHER]
    assert lines.refused == 2
    assert lines.lease((T0 + 5) * NS, lease(job="job1"))[0].count("job=job1") == 1, "a known name stays itself"
    assert "job=job3" in lines.lease((T0 + 86_400) * NS, lease(job="job3"))[0], "another day, other names"


def test_the_guard_counts_what_is_stored_rather_than_what_was_said() -> None:
    guard = Guard(1)
    assert guard("a\\b", 0) == guard("a_b", 0) == "a_b"
    assert guard.refused == 0


def test_two_rows_of_one_moment_are_two_points() -> None:
    lines = every()
    times = [lines.event(Event(n, 0, T0 * NS, "k", detail=str(n)))[0].rpartition(" ")[2] for n in range(3)]
    times += [lines.event(Event(4, 0, T0 * NS + 1_000_000, "k"))[0].rpartition(" ")[2]]
    assert len(set(times)) == 4


def test_a_step_that_another_rank_tells_again_replaces_itself_also_after_a_restart() -> None:
    first = JobStepRow("j", 0, 5, (T0 - 8) * NS, 10 * NS, 12 * NS, 2.0, 100.0, 1200.0, None, (UUID,))
    other = JobStepRow("j", 0, 6, (T0 - 6) * NS, 12 * NS, 14 * NS, 2.0, 100.0, 1200.0, None, (UUID,))
    later = dataclasses.replace(first, end_ns=12 * NS + 7_000_000, energy_j=200.0, gpus=(UUID, "GPU-2"))
    before, after = every(), every()  # the second begins where the first has ended
    made = [before.job(T0 * NS, first)[0], after.job(T0 * NS, other)[0], after.job(T0 * NS, later)[0]]
    times = [text.rpartition(" ")[2] for text in made]
    assert times == [f"{T0 - 8}000", f"{T0 - 6}000", f"{T0 - 8}000"]
    assert "step_energy_joules=200.0" in made[2]


def test_steps_of_jobs_that_share_a_series_are_points_of_their_own() -> None:
    lines = every(values_per_day=1)
    rows = [JobStepRow(name, 0, 5, T0 * NS, NS, 2 * NS, 1.0, 100.0, None, None, (UUID,)) for name in ("named", "x", "y", "x")]
    made = [lines.job(T0 * NS, row)[0] for row in rows]
    assert ["job=other" in text for text in made] == [False, True, True, True]
    times = [int(text.rpartition(" ")[2]) - T0 * 1000 for text in made]
    assert times == [0, 0, 1, 0]


def test_a_jobs_sums_and_restores_are_rows_of_the_job_too() -> None:
    lines = every()
    (sums,) = lines.job(T0 * NS, JobRow("j", 7, 0, steps=3, energy_j=9.5))
    (restored,) = lines.job((T0 + 1) * NS, JobRestored("j", 1, 2))
    assert fields_of(sums)["steps"] == "3i"
    assert fields_of(sums)["energy_joules"] == "9.5"
    assert fields_of(restored) == {"attempt": "1i", "restored_step": "2i"}


def test_a_gpu_that_is_no_uuid_makes_no_series() -> None:
    ns = T0 * NS
    odd = Snapshot(0, ns, ns, (Reading("x y,z=1", ns, Health.UP, 1, power_mw=1),))
    assert every().snapshot(odd) == []
    assert "uuid=" not in every().event(Event(1, 0, ns, "k", uuid="a b"))[0]
