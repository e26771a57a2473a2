"""What README and docs show works: sessions are typed, scripts are run, configurations are read, commands exist."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from powerd import config
from tests.docs import markdown
from tests.docs.markdown import PAGES, ROOT, Block
from tests.e2e.live import LiveNode, clean_environment, wait_for

pytestmark = pytest.mark.xdist_group("docs")

# What an example leaves to its reader: some work on the GPU, and a place to put it.
_READER = """
from powerd.sim import workload
def train():
    workload.load(0, 0.5, 0.2)
train_one_epoch = train_step = step = train
"""
_PROMPT = r"printf '\nprompt:%d:\n' $?"
_BIN = str(Path(sys.executable).parent)


class Shell:
    """A person at a shell: types a line, waits for the prompt, reads what was said."""

    def __init__(self, argv: list[str], env: dict[str, str], folder: Path) -> None:
        self._process = subprocess.Popen(
            argv, env=env, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def type(self, line: str) -> tuple[int, str]:
        """Type one line; (exit code, output)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n{_PROMPT}\n")
        self._process.stdin.flush()
        said: list[str] = []
        for text in self._process.stdout:
            if match := re.fullmatch(r"prompt:(\d+):\n", text):
                return int(match[1]), "".join(said)
            said.append(text)
        raise AssertionError(f"the shell ended: {''.join(said)}")

    def leave(self) -> int:
        """Close the shell as Ctrl-D does, after its jobs; its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("kill %1; wait; exit 0\n")
        self._process.stdin.close()
        reader = threading.Thread(target=self._process.stdout.read)
        reader.start()
        code = self._process.wait(60)
        reader.join(10)
        return code

    def end(self) -> None:
        """Whatever happened: nothing of it stays."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[[list[str]], Shell]]:
    opened: list[Shell] = []

    def start(argv: list[str]) -> Shell:
        env = {**clean_environment(), "PATH": f"{_BIN}:{os.environ['PATH']}", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
        opened.append(Shell(argv, env, tmp_path))
        return opened[-1]

    yield start
    for each in opened:
        each.end()


def test_every_fence_is_of_a_kind_that_is_tested() -> None:
    assert markdown.languages() <= {"console", "python", "python torch", "toml", "sh", "text", "json"}


@pytest.mark.parametrize("block", markdown.blocks("console"), ids=str)
def test_a_session_goes_as_shown(block: Block, shell: Callable[[list[str]], Shell]) -> None:
    first, *lines = markdown.typed(block)
    assert first.startswith("powerd sim run "), "a session starts on a simulated node, so that everybody can type it"
    person = shell(shlex.split(first))
    for line in lines:
        code, said = person.type(line)
        assert code == 0, f"{line}\n{said}"
        if line.endswith("&"):
            wait_for("powerd serves samples", lambda: person.type("powerctl status")[0] == 0)
        elif line.startswith("powerctl"):
            assert "simulated" in said, f"{line}\n{said}"
    assert person.leave() == 0


@pytest.mark.parametrize("block", markdown.blocks("python"), ids=str)
def test_a_script_runs_as_shown(block: Block, live: LiveNode) -> None:
    before = live.state()
    done = live.run([sys.executable, "-c", _READER + block.text])
    assert done.code == 0, done.err
    if "/nowhere/" not in block.text:
        assert "goes on without it" not in done.err, "the example met no daemon"
    after = live.state()
    for row in (*before["gpus"], *after["gpus"]):
        row.pop("setter_calls")  # it may have set something and undone it
    assert after == before


def test_readme_shows_a_training_script_that_measures(live: LiveNode) -> None:
    (block,) = [b for b in markdown.blocks("python") if b.page.name == "README.md"]
    done = live.run([sys.executable, "-c", _READER + block.text])
    assert "EnergyFigure" in done.out, done.out
    assert re.search(r"Verdict\.(APPLIED|PENDING_LOAD)|'(applied|pending_load)'", done.out), done.out


@pytest.mark.parametrize("block", markdown.blocks("toml"), ids=str)
def test_a_configuration_is_read_as_shown(block: Block) -> None:
    assert config.parse(block.text, str(block)) != config.Config(), "an example that changes nothing explains nothing"


def commands() -> list[tuple[str, str]]:
    """(page, command) for everything that pages show to be typed but that is not typed here."""
    found = [(markdown.shown(page), line) for page in PAGES for line in markdown.indented(page)]
    found += [(str(b), line.strip()) for b in markdown.blocks("sh") for line in b.text.splitlines()]
    found += [(markdown.shown(page), code) for page in PAGES for code in re.findall(r"`([^`\n]+)`", page.read_text())]
    return sorted(
        {(page, line) for page, line in found if re.match(r"\S*(powerctl|powerd|make|python3? -m powerd\S*) +[a-z]", line)}
    )


@pytest.fixture(scope="module")
def verbs() -> dict[str, set[str]]:
    """What each program of ours understands as its first word."""
    from typer.main import get_command

    from powerd.cli.main import build

    powerctl: Any = get_command(build())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {
        "powerctl": set(powerctl.commands),
        "powerd": {"run", "hw", "check-config", "restore", "sim"},
        "make": set(re.findall(r"^([a-z-]+):", makefile, re.M)),
    }


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value)
def test_a_command_that_a_page_names_exists(page: str, line: str, verbs: dict[str, set[str]]) -> None:
    words = line.split()
    program = words[0].rsplit("/", 1)[-1]
    if program.startswith("python"):
        paths = [ROOT / place / words[2].replace(".", "/") for place in ("", "policies", "integrations")]
        assert any(path.with_suffix(".py").exists() or (path / "__main__.py").exists() for path in paths), line
    elif program in verbs:
        assert re.sub(r"\W*$", "", words[1]) in verbs[program], line


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    readme = ROOT / "README.md"
    told = [line for line in markdown.indented(readme) if line.startswith("make ")]
    assert told == ["make demo", "make test"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [line for line in told if line not in script] == []
