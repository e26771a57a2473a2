"""The pages are true: every link leads somewhere, every figure has its command. What they must list is tested by its owner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import markdown
from tests.docs.markdown import PAGES, ROOT

# A line of README with a figure -> where the figure comes from: a command that prints it, or the code that decides it.
FIGURES = {
    "names the clock that saves most within 0, 5 and 10 % slowdown": "make demo",
    "powerctl energy --for 5s": "powerctl energy --for 5s",
    "a 95 % interval": "python -m benchmarks energy",
    "settings are undone within 250 ms": "pytest tests/faults (CLIENT_DEADLINE_S)",
}
_FIGURE = re.compile(r"\d\s?(%|ms|W|kW|J|MB|µs|us)\b|\d\s?%")


@pytest.mark.parametrize("page", PAGES, ids=markdown.shown)
def test_every_link_leads_to_a_file(page: Path) -> None:
    assert [t for t in markdown.links(page) if not (page.parent / t.partition("#")[0]).exists()] == []


def test_no_figure_in_the_readme_without_its_command() -> None:
    text = re.sub(r"^```.*?^```\s*$", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = [line for line in text.splitlines() if _FIGURE.search(line)]
    assert [line for line in lines if not any(known in line for known in FIGURES)] == []
    whole = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [known for known in FIGURES if known not in whole] == [], "take it off the list"


def test_the_deadline_that_the_readme_states_is_the_one_that_kills_are_judged_by() -> None:
    from tests.faults import rig

    assert f"within {rig.CLIENT_DEADLINE_S * 1000:.0f} ms" in (ROOT / "README.md").read_text(encoding="utf-8")
