"""What a job's reports add up to: ranks, restores, savings, states, and the same after a restart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from powerd.api import JobEvent, JobStep, JobView
from powerd.clock import NS
from powerd.errors import DeniedError, RequestError
from powerd.jobs import KEEP_STEPS, MAX_JOBS_OF_USER, SILENT_NS, JobRow, JobTable, Record
from powerd.records import JobStepRow

A, B = "GPU-a", "GPU-b"


class Book:
    """A table with a clock that tests move, and what it stored."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.table = JobTable()
        self.table.listeners.append(self.records.append)
        self.now_ns = 1000 * NS

    def say(self, kind: str, job: str = "j", uid: int = 7, **more: Any) -> None:
        self.table.add(job, uid, JobEvent(kind, **more), 10**18 + self.now_ns, self.now_ns)

    def step(self, number: int, energy_j: float | None = 100.0, *, gpu: str = A, time_s: float = 1.0, **more: Any) -> None:
        begin = self.now_ns
        self.say("step", steps=(JobStep(number, begin, begin + round(time_s * NS), (gpu,), energy_j=energy_j, **more),))

    def steps(self, first: int, last: int, energy_j: float | None = 100.0, **more: Any) -> None:
        for number in range(first, last + 1):
            self.now_ns += 2 * NS
            self.step(number, energy_j, **more)

    def view(self, job: str = "j") -> JobView:
        view = self.table.view(job, self.now_ns)
        assert view is not None
        return view


def test_ranks_become_one_step_of_the_slowest_time_and_all_energy() -> None:
    book = Book()
    book.step(0, 100, time_s=1.0, clock_mhz=1400)
    book.step(0, 60, gpu=B, time_s=1.5, clock_mhz=1000)
    view = book.view()
    assert (view.steps, view.time_s, view.energy_j, view.gpus) == (1, 1.5, 160, (A, B))
    (row,) = [r for r in book.records if isinstance(r, JobStepRow)][-1:]
    assert (row.energy_j, row.clock_mhz, row.gpus) == (160, 1200, (A, B))


def step_rows(book: Book) -> list[JobStepRow]:
    return [record for record in book.records if isinstance(record, JobStepRow)]


def test_a_step_goes_by_the_wall_time_of_its_end_which_no_other_step_has_and_no_later_rank_moves() -> None:
    book, wall_ns = Book(), 10**18
    told = [JobStep(n, (990 + n) * NS, (991 + n) * NS, (A,)) for n in range(2)]
    book.say("step", steps=(*told, JobStep(2, 991 * NS, 992 * NS, (A,)), JobStep(3, NS, 2000 * NS, (A,))))
    times = [row.wall_ns - wall_ns for row in step_rows(book)]
    assert times == [991 * NS, 992 * NS, 992 * NS + 1_000_000, 1000 * NS], "a millisecond is of one step; none is to come"
    book.say("step", steps=(JobStep(0, 990 * NS, 999 * NS, (B,)),))
    assert (step_rows(book)[-1].end_ns, step_rows(book)[-1].wall_ns) == (999 * NS, wall_ns + 991 * NS)
    book.now_ns = 10**6 * NS
    book.say("step", steps=(JobStep(4, NS, 2 * NS, (A,)),))
    assert step_rows(book)[-1].wall_ns == wall_ns + book.now_ns - 86_400 * NS, "a time that makes no sense is at most a day old"


def test_goodput_counts_only_what_a_restore_kept() -> None:
    book = Book()
    book.steps(1, 10)
    book.say("restore", step=6)
    assert (book.view().steps, book.view().lost_steps) == (6, 4)
    book.steps(7, 10)
    view = book.view()
    assert (view.steps, view.lost_steps, view.energy_j) == (10, 4, 1400)
    assert view.energy_per_retained_step_j == 140


def test_a_step_that_is_run_again_without_a_word_was_lost_and_one_that_is_told_twice_was_not() -> None:
    book = Book()
    book.steps(1, 5)
    book.step(5)  # the same begin: its answer got lost
    assert (book.view().steps, book.view().lost_steps) == (5, 0)
    book.steps(3, 4)
    view = book.view()
    assert (view.steps, view.lost_steps, view.energy_j) == (4, 3, 700)


def test_a_restore_reaches_behind_the_steps_that_are_kept_one_by_one() -> None:
    book = Book()
    book.steps(1, KEEP_STEPS + 500)
    book.say("restore", step=200)
    assert (book.view().steps, book.view().lost_steps) == (200, KEEP_STEPS + 300)


def test_a_saving_needs_both_sides_measured_on_the_same_gpus() -> None:
    book = Book()
    book.steps(1, 4, 100)
    assert book.view().saving_fraction is None
    book.steps(5, 8, 40, plan="profile")
    book.steps(9, 10, 80, plan="p1")
    assert book.view().saving_fraction is None, "two steps are an anecdote"
    book.steps(11, 13, 80, plan="p1")
    assert book.view().saving_fraction == pytest.approx(0.2)
    assert book.view().plan == "p1"
    book.steps(14, 17, 70, plan="p2")
    assert book.view().saving_fraction == pytest.approx(0.3)
    book.steps(18, 21, 90, plan="baseline")
    assert book.view().plan is None
    book.steps(22, 25, 72, plan="p3")
    assert book.view().saving_fraction == pytest.approx(0.2), "what is marked as baseline goes before what has no plan"
    book.steps(26, 29, 72, plan="p3", gpu=B)
    assert book.view().saving_fraction is None, "another GPU is no comparison"


def test_a_saving_of_steps_without_energy_is_not_told() -> None:
    book = Book()
    book.steps(1, 5, None)
    book.steps(6, 10, 80, plan="p")
    assert book.view().saving_fraction is None


def test_unknown_energy_is_in_no_sum() -> None:
    book = Book()
    book.steps(1, 3, None)
    assert book.view().energy_j is None
    assert book.view().energy_per_retained_step_j is None
    book.steps(4, 5, 50)
    view = book.view()
    assert (view.energy_j, view.unmeasured_steps, view.energy_per_retained_step_j) == (100, 3, 50)
    book.step(5, None, gpu=B)
    view = book.view()
    assert (view.energy_j, view.unmeasured_steps) == (50, 4), "a step of which one rank is unknown is unknown"


def test_checkpoints_cost_time_and_energy() -> None:
    book = Book()
    book.steps(1, 2)
    book.say("checkpoint_begin", time_ns=5 * NS)
    book.say("checkpoint_end", time_ns=8 * NS, energy_j=30.0)
    view = book.view()
    assert (view.checkpoints, view.checkpoint_time_s, view.checkpoint_energy_j, view.energy_j) == (1, 3.0, 30.0, 230.0)


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (["start"], "running"), (["start", "end"], "ended"), (["start", "exception"], "failed"),
        (["start", "exception", "start"], "running"), (["start", "exception", "restore"], "running"),
        (["start", "exception", "end"], "failed"), (["start", "end", "note"], "ended"),
    ],
)  # fmt: skip
def test_the_state_follows_the_events(events: list[str], state: str) -> None:
    book = Book()
    for kind in events:
        book.say(kind, step=0 if kind == "restore" else None, detail=kind)
    assert book.view().state == state
    assert (book.view().end_wall_ns is not None) == (state in ("ended", "failed"))


def test_silence_is_told_and_ends_with_a_word() -> None:
    book = Book()
    book.steps(1, 2)
    book.now_ns += SILENT_NS + NS
    assert book.view().state == "silent"
    book.step(3)
    assert book.view().state == "running"


def test_a_job_is_its_users_own() -> None:
    book = Book()
    book.say("start")
    with pytest.raises(DeniedError):
        book.say("end", uid=8)
    assert [v.job for v in book.table.views(book.now_ns, 8)] == []
    assert book.table.owner("j") == 7


def test_a_user_has_room_for_so_many_running_jobs_and_the_oldest_that_is_over_makes_room() -> None:
    book = Book()
    for number in range(MAX_JOBS_OF_USER):
        book.say("start", job=f"j{number}")
    with pytest.raises(RequestError, match="are running"):
        book.say("start", job="one more")
    book.say("start", job="theirs", uid=8)
    book.say("end", job="j5")
    book.say("start", job="one more")
    names = {v.job for v in book.table.views(book.now_ns, 7)}
    assert "one more" in names
    assert "j5" not in names


def test_an_earlier_daemons_jobs_go_on() -> None:
    book = Book()
    book.steps(1, 8, 100)
    book.say("restore", step=6)
    book.steps(7, 9, 80, plan="p")
    before = book.view()
    after = Book()
    after.now_ns = book.now_ns
    rows = {r.job: r for r in book.records if isinstance(r, JobRow)}
    # As the store keeps them: the newest of each (attempt, step), without those a restore lost.
    steps = {(r.attempt, r.step): r for r in book.records if isinstance(r, JobStepRow) and not (r.attempt == 0 and r.step > 6)}
    after.table.load([replace(r) for r in rows.values()], steps.values(), after.now_ns, 10**18 + after.now_ns)
    assert after.view() == before
    told = steps[1, 9]
    after.say("step", steps=(JobStep(9, told.begin_ns, told.end_ns + 5 * NS, (B,), energy_j=1.0),))
    assert step_rows(after)[-1].wall_ns == told.wall_ns, "a rank that reports after the restart is of the same point"
    after.steps(10, 11, 80, plan="p")
    assert after.view().steps == before.steps + 2


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (JobEvent("stop"), "unknown kind"),
        (JobEvent("restore"), "last step"),
        (JobEvent("start", steps=(JobStep(1, 0, 1, (A,)),)), "kind step"),
        (JobEvent("step", steps=(JobStep(3, 5, 4, (A,)),)), "step 3"),
        (JobEvent("step", steps=(JobStep(3, 4, 5, ()),)), "step 3"),
        (JobEvent("step", steps=(JobStep(3, 4, 5, (A,), energy_j=-1.0),)), "step 3"),
        (JobEvent("checkpoint_end", energy_j=float("nan")), "joules"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(event: JobEvent, says: str) -> None:
    book = Book()
    with pytest.raises(RequestError, match=says):
        book.table.add("j", 7, event, 0, 0)
    assert book.table.view("j", 0) is None
