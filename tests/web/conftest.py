"""One node with an hour of history, one browser; every test opens a page of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.e2e.live import LiveNode
from tests.web.stage import Seen, browser, chromium, fill_hour, opened, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def live() -> Iterator[LiveNode]:
    """Eight simulated GPUs, the first of them under load."""
    chromium()  # before seconds are spent on a node
    with LiveNode(gpus=8) as node, node.load(gpu=0, share=0.6):
        fill_hour(node)
        yield node


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture
def seen(live: LiveNode, chrome: Browser) -> Iterator[Seen]:
    """The dashboard, open and live."""
    with served(live) as page, opened(chrome, page.url) as made:
        yield made


Open = Callable[..., AbstractContextManager[Seen]]


@pytest.fixture(scope="module")
def open_page(chrome: Browser) -> Open:
    """Opens a link in a fresh profile."""
    return partial(opened, chrome)
