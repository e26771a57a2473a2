"""Simulated nodes for tests: stepped, without injected latency unless a test asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pynvml
import pytest

from powerd.sim import node as nodes

MakeNode = Callable[..., nodes.SimNode]


@pytest.fixture
def make_node() -> Iterator[MakeNode]:
    made: list[nodes.SimNode] = []

    def make(model: str = "a100-sxm-500w", gpus: int = 2, time: str = "stepped", **more: Any) -> nodes.SimNode:
        more.setdefault("latency", 0.0)
        node = nodes.create(model, gpus, time, **more)
        made.append(node)
        return node

    yield make
    for node in made:
        node.close()


@pytest.fixture
def nvml(make_node: MakeNode) -> Iterator[Callable[..., tuple[nodes.SimNode, list[Any]]]]:
    """Make a node, load it into this process and return it with its device handles."""
    opened = 0

    def start(*args: Any, **more: Any) -> tuple[nodes.SimNode, list[Any]]:
        nonlocal opened
        node = make_node(*args, **more)
        node.load()
        pynvml.nvmlInit()
        opened += 1
        return node, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(node.gpus)]

    yield start
    if opened:
        pynvml.nvmlShutdown()


@pytest.fixture
def participant() -> Callable[..., tuple[threading.Thread, list[Any]]]:
    """Start a thread that takes part in stepped time from before this call returns until its function ends."""

    def start(node: nodes.SimNode, function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
        joined, out = threading.Event(), []

        def body() -> None:
            slot = node.library.powerd_sim_join(b"participant")
            joined.set()
            out.append(function())
            node.library.powerd_sim_leave(slot)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        assert joined.wait(20)
        return thread, out

    return start


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python children that see a node; they have pynvml as `p` and `handle(i)`; what still runs is killed."""
    head = "import sys, time, os\nimport pynvml as p\np.nvmlInit()\nhandle = p.nvmlDeviceGetHandleByIndex\n"
    children: list[subprocess.Popen[str]] = []

    def start(node: nodes.SimNode, code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", head + code]
        env = {**os.environ, **node.env()}
        child = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()
