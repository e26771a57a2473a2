"""docs/perseus.md: its job is read, its commands are run, and they print what the page shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from powerd_policies.perseus import document, profile, solve
from powerd_policies.perseus.switching import Switching
from tests.docs.markdown import ROOT

PAGE = ROOT / "docs" / "perseus.md"
_PAIR = re.compile(r"```sh\n(?P<commands>.*?)```\n\n```text\n(?P<shown>.*?)```", re.S)
_JSON = re.compile(r"```json\n(.*?)```", re.S)


def lines(text: str) -> str:
    """Without what nobody sees: blanks at line ends."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commands as the page shows them -> what they print, run one after the other in one folder."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "policies").symlink_to(ROOT / "policies")
    (folder / "job.json").write_text(_JSON.findall(PAGE.read_text(encoding="utf-8"))[0])
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    found = {}
    for match in _PAIR.finditer(PAGE.read_text(encoding="utf-8")):
        done = subprocess.run(
            ["sh", "-e", "-c", match["commands"]], cwd=folder, env=env, capture_output=True, text=True, timeout=120
        )  # fmt: skip
        assert done.returncode == 0, match["commands"] + done.stderr
        found[match["commands"]] = lines(done.stdout)
    return found


def test_the_page_shows_what_its_commands_print(printed: dict[str, str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = _PAIR.sub(lambda m: f"```sh\n{m['commands']}```\n\n```text\n{printed[m['commands']]}```", text)
    if os.environ.get("POWERD_WRITE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
    assert len(printed) >= 4
    assert made == PAGE.read_text(encoding="utf-8"), f"POWERD_WRITE_GOLDEN=1 pytest {__file__} writes it anew"


def test_every_key_of_a_job_is_on_the_page() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## JOB.json")[2].partition("## ")[0]
    assert [key for key in document.JobFile.__dataclass_fields__ if f"`{key}`" not in table] == []
    assert [key for key in Switching.__dataclass_fields__ if f"`{key}`" not in table] == []


def test_the_plan_on_the_page_is_the_one_that_is_made() -> None:
    job, shown = (json.loads(block) for block in _JSON.findall(PAGE.read_text(encoding="utf-8")))
    rows = profile.read(ROOT / "policies" / "profiles" / "stage_profile_gpt3-175b_a100_sxm.csv")
    made = solve.solve(document.parse(job), rows, "1.05x").to_json()
    made["job"] = {key: value for key, value in made["job"].items() if key in shown["job"]}
    assert alike(shown, made)


def alike(shown: Any, made: Any) -> bool:
    """Whether a page's figures are those of a plan, but for what a better solver may gain; of a list it shows the first row."""
    if isinstance(shown, dict):
        return set(shown) == set(made) and all(alike(value, made[key]) for key, value in shown.items())
    if isinstance(shown, list):
        return len(shown) == 1 and alike(shown[0], made[0])
    return bool(shown == pytest.approx(made, rel=2e-3) if isinstance(made, float) else shown == made)
