"""Inference pools on the page: real replicas of a real powerd, whose engines a test makes busy, slow, idle and silent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from powerd.replicatypes import ReplicaRequest, SloSpec
from tests.e2e.live import LiveNode, wait_for
from tests.replicas.engine import Endpoint, Engine
from tests.web.conftest import Open
from tests.web.stage import Seen, chromium, served

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("web")]

QUICK = "[replicas]\nscrape_s = 0.2\nstale_s = 1\nwindow_s = 2\npark_after_s = 1\n"


@dataclass
class Busy(Engine):
    """Answers five requests whenever somebody looks; none while ``ttft_s`` is 0."""

    ttft_s: float = 0.2

    def page(self) -> str:
        if self.ttft_s:
            self.ttft += [self.ttft_s] * 5
            self.gaps += [0.03] * 50
        return super().page()


class Service:
    """A node with pool chat (two replicas of one GPU) and pool code (one of two GPUs, with nothing to do)."""

    def __init__(self, node: LiveNode, stack: contextlib.ExitStack) -> None:
        self.node = node
        self.engines = {
            "chat-0": Endpoint(Busy(running=3, waiting=1)), "chat-1": Endpoint(Busy(running=2)),
            "code-0": Endpoint(Busy(running=0, ttft_s=0)),
        }  # fmt: skip
        for engine in self.engines.values():
            stack.callback(engine.close)
        uuids = node.uuids
        gpus = {"chat-0": uuids[:1], "chat-1": uuids[1:2], "code-0": uuids[2:4]}
        self.leases = [
            node.client.replica_create(
                ReplicaRequest(name, name[:4], tuple(gpus[name]), at.url, SloSpec(0.5, 0.1), tp=len(gpus[name]), detached=True)
            ).lease
            for name, at in self.engines.items()
        ]

    def serving(self, name: str) -> Busy:
        """The engine behind a replica."""
        engine = self.engines[name].engine
        assert isinstance(engine, Busy)
        return engine


@pytest.fixture
def service() -> Iterator[Service]:
    chromium()  # before seconds are spent on a node
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(LiveNode(gpus=4, more=QUICK))
        stack.enter_context(node.load(gpu=0, share=0.6))
        made = Service(node, stack)

        def state() -> list[str]:
            return sorted(view.state for view in node.client.replicas())

        wait_for("all replicas are followed", lambda: state() == ["fresh", "fresh", "idle"])
        yield made


def until(seen: Seen, row: str, column: int, text: str) -> None:
    """Wait for a cell: of the replica of this name, or of the pool whose key this is."""
    seen.page.wait_for_function(
        """([name, column, text]) => {
            const rows = [...document.querySelectorAll("#pool-table tbody tr, #replica-table tbody tr")];
            const row = rows.find((r) => r.dataset.key === name || r.cells[0].textContent === name);
            return row !== undefined && row.cells[column].textContent.includes(text);
        }""",
        arg=[row, column, text],
    )


def cells(seen: Seen, table: str) -> list[list[str]]:
    """What a person reads in the rows of a table."""
    rows = seen.page.locator(f"#{table} tbody tr").all()
    return [[cell.replace("\n", " ").strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows]


def test_pools_and_replicas_are_shown_live_and_a_silent_one_as_such(service: Service, open_page: Open) -> None:
    with served(service.node) as page, open_page(page.url) as seen:
        until(seen, "chat TP1", 2, "2 fresh")
        chat, code = cells(seen, "pool-table")
        assert chat[:8] == ["chat", "1", "2 fresh", "2 of 2", "250 ms of 500 ms", "50 ms of 100 ms", "5", "1"]
        assert code[:8] == ["code", "2", "1 idle", "– not known", "– not known", "– not known", "0", "0"]
        first, _, parked = cells(seen, "replica-table")
        assert first[:5] == ["chat-0", "chat", "1", "0", "fresh"]
        assert first[6:8] == ["full clock", "no profile: full clock while there is work"]
        assert parked[3:5] == ["2, 3", "idle"]
        assert parked[6] == "≤ 705 MHz", "half of the highest"
        assert " W" in first[13]
        assert " J in " in first[14]
        drawn = """() => {
            const canvas = document.querySelector("#replica-table tbody td.spark canvas");
            return new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size > 1;
        }"""
        seen.page.wait_for_function(drawn)

        service.serving("chat-0").running = 17
        until(seen, "chat-0", 10, "17")
        until(seen, "chat TP1", 6, "19")

        service.serving("chat-1").ttft_s = 0.9
        until(seen, "chat-1", 8, "missed: 1.00 s of 500 ms")
        until(seen, "chat TP1", 3, "1 of 2")
        until(seen, "chat TP1", 4, "missed: 1.00 s of 500 ms")

        service.engines["chat-0"].close()
        until(seen, "chat-0", 4, "stale")
        until(seen, "chat TP1", 2, "1 stale")
        stale = cells(seen, "replica-table")[0]
        assert stale[6] == "full clock"
        assert stale[7].startswith("metrics are ")
        assert [stale[column] for column in (8, 9, 10, 11)] == ["– not known"] * 4, "old figures are not shown as new ones"
        seen.page.wait_for_function("() => document.querySelector('#announce').textContent.includes('replica stale')")

        for lease in service.leases:
            service.node.client.lease_release(lease.id, lease.token)
        seen.page.wait_for_selector("#pools-none:not([hidden])")
        assert seen.page.locator("#replica-table").is_hidden()
        assert seen.errors == []


def test_pools_are_used_by_keyboard_read_by_screen_readers_and_fit_a_phone(service: Service, open_page: Open) -> None:
    with served(service.node) as page, open_page(page.url, width=360, height=740, dark=True) as seen:
        until(seen, "code-0", 6, "705")
        tree = seen.page.locator("#pools").aria_snapshot()
        for line in ('heading "Inference pools" [level=2]', 'region "Replicas, table"', 'columnheader "TTFT p99 of SLO"',
                     'rowheader "chat"', 'button "Replica code-0: why is its clock as it is"', "cell \"idle\""):  # fmt: skip
            assert line in tree, tree
        seen.page.focus("#pools-link")
        seen.page.keyboard.press("Enter")
        reached = set()
        for _ in range(6):
            seen.page.keyboard.press("Tab")
            reached.add(
                seen.page.evaluate("() => document.activeElement.ariaLabel ?? document.activeElement.getAttribute('aria-label')")
            )
        assert {"Inference pools, table", "Replicas, table", "Replica code-0: why is its clock as it is"} <= reached
        seen.page.focus("#replica-table tbody tr:last-child button")
        seen.page.keyboard.press("Enter")
        seen.page.wait_for_function("() => document.querySelector('#why-gpu').selectedIndex === 2")
        seen.page.wait_for_function(
            "() => document.querySelector('#why-sentence').textContent.includes('replica code-0 of pool')"
        )
        seen.page.wait_for_timeout(2500)  # a round of new figures
        said = seen.page.evaluate("() => document.activeElement.getAttribute('aria-label')")
        assert said == "Replica code-0: why is its clock as it is", "focus stays on its row"
        assert seen.page.evaluate("() => document.documentElement.scrollWidth") <= 360
        assert seen.errors == []
