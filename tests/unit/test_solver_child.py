"""The plan service's child: its answer, its limits, and whose fault its end is."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from powerd import solver_child
from powerd.clock import RealClock
from powerd.errors import PowerdError, RequestError, UnavailableError
from powerd.solver_child import Solver

JOB = json.dumps({"schedule": "1f1b", "profile_rows": [[0, "forward", 1410, 0.1, 30.0]]}).encode()


def plan(script: str, body: bytes = JOB) -> dict[str, object]:
    solver = Solver(RealClock(), (sys.executable, "-I", "-c", script))
    answer: dict[str, object] = json.loads(asyncio.run(solver.plan(body)))
    return answer


def test_the_job_goes_in_and_the_plan_comes_out() -> None:
    script = "import json, sys; print(json.dumps(json.load(sys.stdin)))"
    rows = [[0, "forward", 1410, 0.1, 30.0]]
    together = {"schedule": "1f1b", "profile_rows": rows, "deadline": "1.05x"}
    apart = {"job": {"schedule": "1f1b"}, "profile_rows": rows, "deadline": "1.05x"}
    assert plan(script, json.dumps(together).encode()) == plan(script, json.dumps(apart).encode()) == apart


@pytest.mark.parametrize(
    ("script", "kind", "says"),
    [
        ('print(\'{"error": "row 3: time is NaN"}\'); raise SystemExit(2)', RequestError, "row 3: time is NaN"),
        ("raise SystemExit(2)", UnavailableError, "the planner failed"),
        ("print('nonsense')", UnavailableError, "the planner failed"),
        ("import nowhere_to_be_found", UnavailableError, "pip install 'powerd[plan]'"),
        ("raise MemoryError", RequestError, "not planned within 2 GiB"),
        ("import os; os.kill(os.getpid(), 24)", RequestError, "60 s of CPU"),
        ("raise ValueError('a bug')", UnavailableError, "a bug"),
    ],
)
def test_every_other_end_says_whose_fault_it_is(script: str, kind: type[PowerdError], says: str) -> None:
    with pytest.raises(kind, match=says.replace("[", r"\[")):
        plan(script)


def test_a_child_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_child, "TIME_S", 0.5)
    with pytest.raises(RequestError, match="not planned within"):
        plan("import time; time.sleep(600)")


def test_limits_are_those_that_are_promised() -> None:
    """The child as it is started really, but for what it runs in the end."""
    program = solver_child._CHILD.replace(
        f'runpy.run_module("{solver_child.PLANNER}", run_name="__main__", alter_sys=True)',
        "import json; print(json.dumps({name: resource.getrlimit(getattr(resource, 'RLIMIT_' + name))[0] "
        "for name in ('AS', 'CPU', 'CORE')} | {'nice': os.nice(0)}))",
    )
    assert program != solver_child._CHILD
    assert plan(program) == {"AS": 2 << 30, "CPU": 60, "CORE": 0, "nice": 10}


def test_two_at_a_time_and_ten_in_all() -> None:
    async def ask() -> tuple[int, list[BaseException | bytes]]:
        script = "import sys; sys.stdin.read(); print('{}')"
        solver = Solver(RealClock(), (sys.executable, "-I", "-S", "-c", script))
        most, run = 0, solver._run

        def counted(body: bytes) -> bytes:
            nonlocal most
            most = max(most, solver_child.AT_ONCE - solver._slots._value)
            return run(body)

        solver._run = counted  # type: ignore[method-assign]
        found = await asyncio.gather(*(solver.plan(JOB) for _ in range(12)), return_exceptions=True)
        return most, found

    most, found = asyncio.run(ask())
    assert most == 2
    refused = [f for f in found if isinstance(f, RequestError)]
    assert [f.code.name for f in refused] == ["too_many"] * 2
    assert [json.loads(f) for f in found if isinstance(f, bytes)] == [{}] * 10


def test_what_still_runs_ends_with_the_daemon() -> None:
    async def stopped() -> None:
        solver = Solver(RealClock(), (sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"))
        task = asyncio.create_task(solver.plan(JOB))
        while not solver._children:
            await asyncio.sleep(0.01)
        solver.stop()
        with pytest.raises(UnavailableError, match="stopping"):
            await task

    asyncio.run(asyncio.wait_for(stopped(), 20))


def test_a_daemon_without_solvers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_child, "_NEEDS", ("no_such_solver",))
    with pytest.raises(UnavailableError, match=r"no_such_solver is missing \(pip install 'powerd\[plan\]'\)"):
        asyncio.run(Solver(RealClock()).plan(JOB))
