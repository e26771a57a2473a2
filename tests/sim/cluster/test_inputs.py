"""What is refused before anything runs, and what a long run costs in memory."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from powerd.sim import build
from powerd.sim.cluster import Cluster, ClusterConfig, Requests, core
from powerd_policies.dynamollm.classes import NAMES, Classes
from tests.sim.cluster.models import fleet, llama, patient, toy


@pytest.mark.parametrize(
    ("arrivals", "prompts", "outputs", "message"),
    [
        ([0.0, 2.0, 1.0], [1, 1, 1], [1, 1, 1], "number 2 at 1 s comes after 2 s"),
        ([0.0, 1.0], [5, 0], [1, 1], "number 1 has 0 prompt tokens"),
        ([0.0, 1.0], [5, 5], [-3, 1], "number 0 has -3 output tokens"),
        ([0.0, float("nan")], [5, 5], [1, 1], "arrival 1 is not a number"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(arrivals: list[float], prompts: list[int], outputs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Requests.of(arrivals, prompts, outputs)


def test_arrays_of_different_length_and_unknown_classes_are_refused() -> None:
    kinds = np.zeros(2, dtype=np.uint8)
    with pytest.raises(ValueError, match="2 arrivals but 1 of output_tokens"):
        Requests(np.zeros(2), np.ones(2, np.int32), np.ones(1, np.int32), kinds, kinds)
    with pytest.raises(ValueError, match="number 1 is routed by class 9"):
        Requests(np.zeros(2), np.ones(2, np.int32), np.ones(2, np.int32), kinds, kinds + np.asarray([0, 9], dtype=np.uint8))


def test_requests_are_classified_as_the_classes_do() -> None:
    classes = Classes()
    lengths = [(p, o) for p in (1, 255, 256, 1023, 1024, 8192) for o in (1, 99, 100, 349, 350, 2000)]
    prompts, outputs = zip(*lengths, strict=True)
    trace = Requests.of(np.zeros(len(lengths)), prompts, outputs, predicted_tokens=[1] * len(lengths))
    assert [NAMES[n] for n in trace.true_class] == [classes.name(p, o) for p, o in lengths]
    assert [NAMES[n] for n in trace.routed_class] == [classes.name(p, 1) for p, _ in lengths]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk_tokens": 256}, "chunk_tokens .256. has to be more than max_running .256."),
        ({"chunk_by_tp": {4: 100}}, "chunk_tokens .100. has to be more than max_running .256."),
        ({"max_running": 0}, "max_running is 0"),
        ({"start_s": -1.0}, "start_s is -1.0"),
        ({"tick_s": 0.0}, "tick_s is 0.0"),
        ({"park_after_s": float("inf")}, "park_after_s is inf"),
    ],
)
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**wrong)


def test_what_the_model_does_not_hold_is_refused() -> None:
    trace = Requests.of([5.0], [10], [10], patient())
    with pytest.raises(ValueError, match="the first request comes at 5 s, before 6 s"):
        Cluster(toy(), trace, patient(), ClusterConfig(begin_s=6.0))
    with pytest.raises(ValueError, match="park_clock_mhz 123"):
        Cluster(toy(), trace, patient(), ClusterConfig(park_after_s=1.0, park_clock_mhz=123))
    with pytest.raises(ValueError, match="0 GPUs"):
        Cluster(toy(), trace, patient(), gpus=0)


def test_time_reaches_the_end_whatever_its_digits() -> None:
    for arrival_s in (0.1234567891234, 3599.7777777777777, 604_799.123456789123):
        cluster = Cluster(toy(), Requests.of([arrival_s], [10], [10], patient()), patient(), gpus=1)
        cluster.advance(cluster.end_s)
        assert cluster.now_s == cluster.end_s


def test_time_does_not_go_back() -> None:
    cluster = Cluster(toy(), Requests.of([5.0], [10], [10], patient()), patient(), ClusterConfig(begin_s=2.0), 1)
    assert (cluster.now_s, cluster.end_s) == (2.0, 125.0)
    cluster.advance(3.0)
    with pytest.raises(ValueError, match=r"it is 3 s, 2\.5 s has passed"):
        cluster.advance(2.5)


def test_structures_are_those_of_the_header() -> None:
    library = core.load()
    for number, structure in enumerate(core.STRUCTURES):
        assert library.cluster_sizeof(number) == ctypes.sizeof(structure)


def test_the_core_compiles_without_a_warning() -> None:
    strict = ["-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
    sources = [str(path) for path in sorted(core.SOURCES.glob("*.c"))]
    assert len(sources) == 6
    command = [*build.find_compiler(), "-std=gnu11", *strict, *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_fails_is_named_with_what_it_was_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="cannot build the core of the cluster simulator: no luck"):
        build.build(core.LIBRARY)


def test_a_long_run_keeps_its_memory() -> None:
    """A second half as long as the first needs no more than the power's ticks."""
    count = 400_000
    random = np.random.default_rng(1)
    trace = Requests.of(
        np.arange(count) * 0.05, random.integers(1, 2000, count), random.integers(1, 400, count)
    )  # fmt: skip
    cluster = Cluster(llama(), trace, gpus=96)
    cluster.apply(fleet(*[(None, 8, 1980)] * 12))
    process, seen = psutil.Process(), []
    for n in range(1, 101):
        cluster.advance(n * count * 0.05 / 100)
        cluster.state()
        if n in (50, 100):
            seen.append(process.memory_info().rss)
    assert cluster.results().counts["finished"] > 0.99 * count
    assert seen[1] - seen[0] < 4 * 2**20
