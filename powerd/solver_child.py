"""Plans for jobs without a solver of their own: one short-lived child per plan, niced and limited.

House rules: this process solves nothing and imports no planner; the child gets the job on stdin and no file name, may use so
much memory and time and no more, and is gone with the answer; what it says of the job is the caller's fault, the rest ours.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from typing import Any

import msgspec

from powerd.clock import Clock, standing
from powerd.decode import json_object
from powerd.errors import PowerdError, RequestError, UnavailableError
from powerd.log import log

AT_ONCE = 2
WAITING = 8  # more are refused
TIME_S = 60.0  # of CPU, and of the clock on the wall: real time, because the work is
MEMORY_BYTES = 2 << 30
NICE = 10
MAX_ANSWER_BYTES = 64 << 20
PLANNER = "powerd_policies.perseus"
_NEEDS = ("powerd_policies", "numpy", "scipy", "ortools")

#: Limits are set in the child itself: between fork and exec of a process with threads nothing of Python may run.
_CHILD = f"""
import os, resource, runpy
os.nice({NICE})
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CPU, ({TIME_S:.0f}, {TIME_S:.0f} + 1))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
runpy.run_module("{PLANNER}", run_name="__main__", alter_sys=True)
"""


class Solver:
    """Plans on request; use it from one thread (the daemon's loop)."""

    def __init__(self, clock: Clock, command: tuple[str, ...] | None = None) -> None:
        self._clock = clock
        self._command = command or (sys.executable, "-I", "-c", _CHILD)
        self._needs = _NEEDS if command is None else ()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._asked = 0
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    async def plan(self, body: bytes) -> bytes:
        """The plan as JSON. RequestError when the job makes no sense, UnavailableError when it cannot be planned here.

        Stepped time stands still meanwhile: the child's real seconds are nothing that happens on the simulated node, and whoever
        asked is set aside, so that leases would expire and steps be missed if time went on.
        """
        if missing := next((name for name in self._needs if importlib.util.find_spec(name) is None), None):
            raise UnavailableError(f"this daemon cannot plan: {missing} is missing", hint="pip install 'powerd[plan]'")
        if self._asked >= AT_ONCE + WAITING:
            raise RequestError(f"{self._asked} plans are being made", hint="try again", code="too_many")
        self._asked += 1
        try:
            with standing(self._clock):
                async with self._slots:
                    return await asyncio.to_thread(self._run, body)
        finally:
            self._asked -= 1

    def _run(self, body: bytes) -> bytes:
        body = request(body)
        # One thread each: 2 GiB of address space hold few arenas, and the node's cores are the job's.
        env = {"PATH": os.environ.get("PATH", ""), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
        pipe = subprocess.PIPE
        try:
            child = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd="/")
        except OSError as error:
            raise UnavailableError(f"the planner cannot be started: {error.strerror}", code="busy") from error
        with child:
            self._children.add(child)
            try:
                out, err = child.communicate(body, TIME_S)
            except subprocess.TimeoutExpired as error:
                raise too_large(f"{TIME_S:.0f} s") from error
            finally:
                child.kill()
                self._children.discard(child)
        if self._stopped:
            raise UnavailableError("powerd is stopping", code="busy")
        return answer(child.returncode, out, err)

    def stop(self) -> None:
        """End what still runs: nobody waits for its answer."""
        self._stopped = True
        for child in tuple(self._children):
            child.kill()


def too_large(limit: str) -> RequestError:
    """The job was not solved within what a child may use."""
    return RequestError(f"not planned within {limit}", hint="fewer microbatches or clocks", code="bad_value")


def request(body: bytes) -> bytes:
    """What the planner reads; RequestError unless the body is a job with its profile in it: no file is read for anybody.

    A job (docs/perseus.md) with ``profile_rows`` and ``deadline`` among its keys, or apart from it: ``{"job": {...}, ...}``.
    """
    content = json_object(body)
    apart = {key: content.pop(key) for key in ("profile_rows", "deadline") if key in content}
    job = content.pop("job") if "job" in content else content
    if isinstance(job, dict) and "profile" in job:
        raise RequestError("the daemon reads no profile file", hint="send its rows inline as profile_rows", code="bad_value")
    if not isinstance(apart.get("profile_rows"), list):
        raise RequestError(
            "profile_rows is missing", hint="a list of [stage, instruction, frequency, time, energy]", code="bad_value"
        )
    unknown = {} if job is content else content  # beside a job of its own: the planner refuses it by name
    return msgspec.json.encode({"job": job, **apart, **unknown})


def answer(code: int, out: bytes, err: bytes) -> bytes:
    """What a child's end means: its answer, or an error that says whose fault it is."""
    said: Any = None
    try:
        said = msgspec.json.decode(out) if len(out) <= MAX_ANSWER_BYTES else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    if code == 0 and isinstance(said, dict):
        return out
    if code == 2 and isinstance(said, dict) and isinstance(said.get("error"), str):
        raise RequestError(said["error"][:1000], hint=str(said.get("hint") or "see docs/perseus.md"), code="bad_value")
    last = (err.decode("utf-8", "replace").strip().splitlines() or [""])[-1][:300]
    log("planner_failed", code=code, why=last)
    if code in (-24, -9):  # SIGXCPU, or SIGKILL a second later
        raise too_large(f"{TIME_S:.0f} s of CPU")
    if "MemoryError" in last or "bad_alloc" in last:
        raise too_large(f"{MEMORY_BYTES >> 30} GiB")
    if "No module named" in last:
        raise UnavailableError(f"this daemon cannot plan: {last}", hint="pip install 'powerd[plan]'")
    failure: PowerdError = UnavailableError("the planner failed", hint=last or f"exit code {code}; powerd's log says more")
    raise failure
