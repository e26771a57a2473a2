"""The parts of the conductor by themselves: places, orders, sheets, the sweep, pace, planning, a GPU's moments, bad options."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from powerd.errors import RequestError
from powerd_integrations.adapter import place_in
from powerd_integrations.pipeline import Options, Place, launch, place_of, rendezvous
from powerd_integrations.pipeline.agreement import TABLE, Event, MakePlan, State
from powerd_integrations.pipeline.gpu import iteration
from powerd_integrations.pipeline.measured import Profile, Row, Sheet, collapse, fingerprint, load, save
from powerd_integrations.pipeline.pace import Pace, Slow
from powerd_integrations.pipeline.place import first_host
from powerd_integrations.pipeline.planning import AtDaemon, as_it_is, in_time, planning
from powerd_integrations.pipeline.recorded import OrderError, agree, check, keys
from powerd_integrations.pipeline.sweep import Sweep, ladder
from powerd_integrations.torch_timing import EventTiming
from powerd_policies.perseus import schedules
from tests.unit.pipeline_rig import BLOCKING_W, CLOCKS, joules, seconds

# -- places -----------------------------------------------------------------------------------------------------------------


def test_ranks_are_placed_as_megatron_lays_them_out() -> None:
    places = [place_of(n, 16, ranks=4, tensors=2) for n in range(16)]
    assert places[0] == Place(0, 0, 0, 2, 4, 2)
    assert places[1].tensor == 1
    assert (places[2].pipeline, places[2].rank) == (1, 0)
    assert [p.rank for p in places[::4]] == [0, 1, 2, 3]
    with pytest.raises(RequestError, match="10 ranks do not make pipelines of 4"):
        place_of(0, 10, ranks=4)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, (5, 8, 1, "torchrun")),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1, "srun")),
        ({"SLURM_PROCID": "3"}, (0, 1, 0, "none")),
        ({}, (0, 1, 0, "none")),
    ],
)
def test_launchers_say_who_a_process_is(environ: dict[str, str], expected: tuple[int, int, int, str]) -> None:
    who = launch(environ)
    assert (who.rank, who.world_size, who.local_rank, who.launcher) == expected


def test_ranks_under_srun_meet_at_the_first_host_of_the_job() -> None:
    slurm = {"SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[07-09,12],login", "SLURM_JOB_ID": "123456"}
    ranks = [rendezvous({**slurm, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2)}) for n in range(4)]
    assert [r["RANK"] for r in ranks] == ["0", "1", "2", "3"]
    assert {(r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks} == {("gpu07", "23456")}
    kept = rendezvous({**slurm, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "mine", "MASTER_PORT": "1"})
    assert (kept["MASTER_ADDR"], kept["MASTER_PORT"]) == ("mine", "1")
    assert [first_host(t) for t in ("a,b", "a1", "n[3,5]", "n[03-04]-ib", "a,n[1-2]")] == ["a", "a1", "n3", "n03-ib", "a"]


def test_torch_ranks_find_their_place_from_everybodys_groups() -> None:
    # two pipelines of two ranks, two tensor-parallel peers each: world rank = pipeline * 4 + rank * 2 + peer
    groups = []
    for n in range(8):
        pipeline, rank, peer = n // 4, n // 2 % 2, n % 2
        groups.append(([pipeline * 4 + peer, pipeline * 4 + 2 + peer], [pipeline * 4 + rank * 2, pipeline * 4 + rank * 2 + 1]))
    assert [place_in(groups, n) for n in range(8)] == [Place(n // 4, n // 2 % 2, n % 2, 2, 2, 2) for n in range(8)]


# -- orders -----------------------------------------------------------------------------------------------------------------


def told(order: Any, pipelines: int = 1) -> list[tuple[Place, Any]]:
    return [(Place(p, r, 0, pipelines, len(order), 1), keys(rank)) for p in range(pipelines) for r, rank in enumerate(order)]


@pytest.mark.parametrize("name", list(schedules.SCHEDULES))
def test_every_schedule_that_we_know_agrees_with_itself(name: str) -> None:
    order = schedules.order(name, 4, 6, 2 if name in ("interleaved", "zb-h1") else 1)
    promised = tuple(keys(rank) for rank in order)
    assert agree(told(order, 2)) == (promised, promised)


def test_pipelines_may_be_unequal_in_microbatches_but_not_in_sequence_or_stages() -> None:
    short, long = schedules.order("1f1b", 2, 3), schedules.order("1f1b", 2, 5)

    def both(a: Any, b: Any) -> list[tuple[Place, Any]]:
        return [(Place(p, r, 0, 2, len(o), 1), keys(rank)) for p, o in enumerate((a, b)) for r, rank in enumerate(o)]

    assert [len(rank) for pipeline in agree(both(short, long)) for rank in pipeline] == [6, 6, 10, 10]
    with pytest.raises(OrderError, match="rank 0 of pipeline 1 ran another order than rank 0 of pipeline 0"):
        agree(both(short, schedules.order("gpipe", 2, 3)))
    with pytest.raises(OrderError, match="pipeline 1 has other stages or instructions than pipeline 0"):
        agree(both(short, schedules.order("1f1b", 3, 5)))
    with pytest.raises(OrderError, match=r"pipeline 0: rank [01] left out the backward"):
        agree([(Place(0, 0, 0, 1, 2), keys(long[0])), (Place(0, 1, 0, 1, 2), keys(long[1][:-1]))])
    peers = [(Place(0, 0, t, 1, 1, 2), keys(schedules.order(name, 1, 3)[0])) for t, name in enumerate(("gpipe", "1f1b"))]
    with pytest.raises(OrderError, match="tensor-parallel peer 1"):
        agree(peers)


def test_an_order_that_cannot_be_names_the_rank() -> None:
    good = [list(keys(rank)) for rank in schedules.order("1f1b", 2, 2)]
    cyclic = [good[0], [(1, "backward", 0), *[k for k in good[1] if k != (1, "backward", 0)]]]
    with pytest.raises(OrderError, match=r"cyclic: rank [01] waits for ever"):
        check([tuple(rank) for rank in cyclic])
    with pytest.raises(OrderError, match="rank 1 left out the backward of microbatch 1 on stage 1"):
        check([tuple(good[0]), tuple(k for k in good[1] if k != (1, "backward", 1))])
    with pytest.raises(OrderError, match="rank 0 ran forward of microbatch 0 on stage 0 a second time"):
        check([(*good[0], good[0][0]), tuple(good[1])])
    with pytest.raises(OrderError, match="rank 1 ran nothing"):
        check([tuple(good[0]), ()])
    with pytest.raises(OrderError, match="without forward"):
        check([tuple(good[0]), tuple(k for k in good[1] if k != (1, "forward", 0))])


# -- profiles ---------------------------------------------------------------------------------------------------------------


def sheet(mhz: int, stages: int = 2, slower: float = 1.0) -> Sheet:
    rows = [
        Row(s, k, mhz, seconds(s, k, mhz) * slower, joules(s, k, mhz)) for s in range(stages) for k in ("backward", "forward")
    ]
    return Sheet(mhz, tuple(rows), BLOCKING_W, 0.1)


def test_peers_collapse_to_the_slowest_time_and_the_mean_energy_of_a_gpu() -> None:
    both = collapse(
        [
            Sheet(900, (Row(0, "forward", 900, 1.0, 300.0),), 80.0, 1.0),
            Sheet(900, (Row(0, "forward", 900, 1.2, 340.0),), 100.0, 3.0),
        ]
    )
    assert both.rows == (Row(0, "forward", 900, 1.2, 320.0),)
    assert both.blocking_w == pytest.approx(95.0)  # by how long each was blocked


def test_a_kept_profile_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    profile = Profile({mhz: sheet(mhz) for mhz in CLOCKS[:3]})
    key = fingerprint(["A"], ["1"], ["s"], 2)
    assert key != fingerprint(["A"], ["2"], ["s"], 2)
    save(tmp_path, key, profile)
    assert load(tmp_path, key) == profile
    assert load(tmp_path, "other") is None
    path = tmp_path / f"{key}.json"
    content = json.loads(path.read_text())
    for bad in (
        "{",
        "[]",
        json.dumps({**content, "format": 99}),
        json.dumps({**content, "fingerprint": "x"}),
        json.dumps({**content, "sheets": [{}]}),
    ):
        path.write_text(bad)
        assert load(tmp_path, key) is None
    content["sheets"][0]["rows"][0][3] = math.nan
    path.write_text(json.dumps(content))
    assert load(tmp_path, key) is None
    assert not list(tmp_path.glob(".*"))  # no half-written file stays


def test_the_ladder_has_what_all_gpus_have() -> None:
    assert ladder([(600, 700, 800, 900), (700, 800, 900, 1000)], 1, None, None) == (900, 800, 700)
    assert ladder([CLOCKS], 4, 700, 1200) == (1200, 960, 720)
    assert ladder([(600,), (700,)], 1, None, None) == ()


def test_a_clock_that_nobody_can_measure_is_left_out_after_three_tries() -> None:
    sweep = Sweep((900, 800))
    assert [sweep.take(900, [None]), sweep.take(900, [None]), sweep.take(900, [None])] == [False, False, True]
    assert sweep.next_mhz == 800
    sweep.take(800, [sheet(800)])
    assert sweep.done
    assert set(sweep.profile.sheets) == {800}


# -- pace and plans -----------------------------------------------------------------------------------------------------------


def test_a_pipeline_that_follows_is_no_straggler_and_one_bad_iteration_means_nothing() -> None:
    pace = Pace(0.03, 2)
    assert not pace.tell([1.02, 1.02], [1.0, 1.0])  # what communication adds to both
    assert not pace.tell([1.02, 1.3], [1.0, 1.0])
    assert not pace.tell([1.02, 1.02], [1.0, 1.0])
    pace.tell([1.02, 1.224], [1.0, 1.0])
    assert pace.tell([1.02, 1.224], [1.0, 1.0])
    assert pace.times_s == {1: pytest.approx(1.2)}
    for _ in range(4):
        pace.tell([1.224, 1.224], [1.2, 1.0])  # pipeline 0 follows by plan
    assert set(pace.times_s) == {1}
    for _ in range(3):
        pace.tell([1.224, 1.02], [1.2, 1.0])
    assert pace.times_s == {}
    assert not pace.tell([None, 5.0], [1.0, 1.0])


def test_a_stage_under_a_ceiling_is_planned_with_its_top_clock_at_the_ceilings_time() -> None:
    rows = [row for mhz in CLOCKS for row in sheet(mhz).rows]
    cut = {(r.stage, r.kind, r.mhz): r for r in as_it_is(rows, {1: Slow(1.0, 1020), 0: Slow(1.5)})}
    assert cut[1, "forward", 1440].time_s == pytest.approx(seconds(1, "forward", 1020), rel=1e-4)
    assert cut[1, "forward", 900].time_s == seconds(1, "forward", 900)
    assert cut[1, "forward", 1440].time_s < cut[1, "forward", 1080].time_s  # so that it is the one that is taken
    assert cut[0, "backward", 900].time_s == pytest.approx(1.5 * seconds(0, "backward", 900))


@pytest.mark.parametrize("here", [True, False])
def test_deadlines_follow_the_slowest_other_pipeline(here: bool) -> None:
    order = tuple(keys(rank) for rank in schedules.order("1f1b", 2, 4))
    rows = [row for mhz in CLOCKS for row in sheet(mhz).rows]
    daemon: Any = _Daemon()
    planner = planning((order, order), rows, BLOCKING_W, Options(plan_locally=here), "p", daemon)
    usual, other = planner.plan(MakePlan(({}, {}), {}))
    assert usual == other
    assert usual["iteration_s"] <= usual["baseline_s"] * (1 + 1e-9)
    assert usual["energy_j"] < usual["baseline_j"]
    assert [len(rank) for rank in usual["clocks"]] == [8, 8]
    late_s = usual["deadline_s"] * 1.1
    follows, straggler = planner.plan(MakePlan(({}, {}), {1: late_s}))
    assert follows["deadline_s"] == pytest.approx(late_s)
    assert straggler == usual
    assert planner.plan(MakePlan(({}, {}), {})) == [usual, usual]  # the same plan under the same name again
    lame, normal = planner.plan(MakePlan(({1: Slow(1.3)}, {}), {}))
    assert lame["iteration_s"] == pytest.approx(normal["deadline_s"], rel=1e-6)
    assert lame["iteration_s"] > usual["iteration_s"] * 1.1


def test_a_pipeline_with_fewer_microbatches_takes_the_time_of_the_longer_one() -> None:
    orders = tuple(tuple(keys(rank) for rank in schedules.order("1f1b", 2, m)) for m in (4, 6))
    rows = [row for mhz in CLOCKS for row in sheet(mhz).rows]
    daemon: Any = _Daemon()
    short, long = planning(orders, rows, BLOCKING_W, Options(), "p", daemon).plan(MakePlan(({}, {}), {}))
    assert short["deadline_s"] == long["deadline_s"] == pytest.approx(long["baseline_s"])
    assert short["iteration_s"] > short["baseline_s"] * 1.05
    assert [len(plan["clocks"][0]) for plan in (short, long)] == [8, 12]


class _Daemon:
    """Plans as the daemon does: from JSON to JSON."""

    def perseus_plan(self, job: dict[str, Any]) -> dict[str, Any]:
        from powerd_policies.perseus import baselines, document, planner

        content = json.loads(json.dumps(job))
        rows = document.rows_of(content.pop("profile_rows"))
        deadline = content.pop("deadline")
        parsed = document.parse(content)
        problem = parsed.problem(rows)
        baseline = baselines.max_clock(problem)
        fastest_s = planner.fastest(problem).iteration_time_s
        deadline_s = document.deadline_s(deadline, baseline.iteration_time_s, fastest_s)
        found = document.to_json(planner.plan(problem, deadline_s, parsed.switching), baseline)
        answer: dict[str, Any] = json.loads(json.dumps(found))
        return answer


def test_instructions_too_short_for_a_change_of_clock_are_planned_all_the_same() -> None:
    asked: list[float] = []

    def plan(factor: float, least: float = math.inf) -> dict[str, Any]:
        asked.append(factor)
        if factor < least:
            raise RequestError("no plan found ends within that when a clock takes so long to change")
        return {"clocks": [], "factor": factor}

    assert in_time(lambda factor: plan(factor, 1.0), dict)["factor"] == 1.0
    assert in_time(lambda factor: plan(factor, 1.001), dict)["factor"] == asked[-1] > 1.0
    assert in_time(plan, lambda: {"clocks": ["without"]}) == {"clocks": ["without"]}
    assert max(asked) < 1.01  # hardly later


def test_a_daemon_that_makes_no_plan_is_an_error_that_says_so() -> None:
    order = tuple(keys(rank) for rank in schedules.order("1f1b", 2, 2))
    daemon: Any = SimpleNamespace(perseus_plan=lambda job: {})
    with pytest.raises(Exception, match="the daemon made no plan"):
        AtDaemon([], order, 80.0, {}, daemon).at(None)


def test_waiting_for_gradients_inside_the_last_backward_is_no_work() -> None:
    what = [(0, "forward", 0), (0, "forward", 1), (0, "forward", 2), (0, "backward", 0), (0, "backward", 1), (0, "backward", 2)]
    ends = [10, 20, 30, 50, 70, 170]  # the last backward waits eighty longer than it works
    times = [t for begin, end in zip([0, *ends], ends, strict=False) for t in (begin, end)]
    found = iteration(0, 171, what, times)
    assert found.instructions[-1][1:] == (70, 90)
    assert found.whole_s == 90e-9
    assert found.instructions[:-1] == tuple(zip(what, times[::2], times[1::2], strict=True))[:-1]


# -- options and states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"slowdown": -0.1}, {"iterations_per_clock": 0}, {"tolerance": 2.0}, {"job": ""}, {"clock_stride": True}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Options(**wrong)


def test_off_is_the_end_and_can_be_reached_from_everywhere() -> None:
    assert not [state for state, _ in TABLE if state is State.OFF]
    assert {state for state, event in TABLE if event is Event.FAILED} == set(State) - {State.OFF}
    reached = {State.WARMUP}
    while more := {after for (before, _), after in TABLE.items() if before in reached} - reached:
        reached |= more
    assert reached == set(State)


# -- a GPU's own moments --------------------------------------------------------------------------------------------------------


class _Cuda:
    """CUDA's events over a clock that the test moves: an event ends when the GPU has come that far."""

    def __init__(self) -> None:
        self.now_ms, self.queued_ms = 0.0, 0.0

    def current_stream(self, device: Any) -> Any:
        return self

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 torch's name
        cuda = self

        class Event:
            at_ms = -1.0

            def record(self, stream: Any) -> None:
                self.at_ms = cuda.queued_ms

            def query(self) -> bool:
                return cuda.now_ms >= self.at_ms

            def synchronize(self) -> None:
                cuda.now_ms = max(cuda.now_ms, self.at_ms)

            def elapsed_time(self, end: Any) -> float:
                assert self.query()
                assert end.query()
                return float(end.at_ms - self.at_ms)

        return Event()


def test_a_beat_leaves_when_the_gpu_has_ended_the_instruction_not_when_it_was_queued() -> None:
    cuda = _Cuda()
    timing = EventTiming(lambda: round(cuda.now_ms * 1e6), "cuda:0", cuda)
    sent: list[tuple[int, int]] = []
    gone = threading.Event()

    def send(step: int, index: int) -> None:
        sent.append((step, index))
        gone.set()

    begin = timing.mark()
    cuda.queued_ms = 40.0  # forty milliseconds of work are in the queue
    end = timing.mark()
    timing.announce(end, send, 3, 1)
    cuda.now_ms = 39.0
    assert not gone.wait(0.05)
    cuda.now_ms = 40.0
    assert gone.wait(5)
    assert sent == [(3, 1)]
    assert timing.resolve([begin, end]) == [0, 40_000_000]
    cuda.queued_ms = 90.0
    late = timing.mark()
    assert timing.resolve([end, late]) == [40_000_000, 90_000_000]  # waits for the GPU when it must
    timing.close()
