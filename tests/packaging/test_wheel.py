"""What a user gets: the built wheel in an environment that has nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Files that belong to working on the source, not to using it.
NOT_SHIPPED = {".pyc"}
BARE_MODULES = ["powerd.client", "powerd.model", "powerd.api", "powerd.errors", "powerd_policies", "powerd_integrations"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without any download."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with powerd and no extra; pip would fail if powerd needed anything."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", wheel)
    return python


def inside(python: Path, code: str) -> str:
    """What code prints in the clean environment, away from the checkout."""
    return run(python, "-I", "-c", code).stdout.strip()


def test_the_clean_environment_has_powerd_and_nothing_else(clean: Path) -> None:
    names = inside(clean, "from importlib.metadata import distributions as d; print(sorted(x.metadata['Name'] for x in d()))")
    assert names == "['powerd']"


@pytest.mark.parametrize("module", BARE_MODULES)
def test_it_imports_without_any_extra(clean: Path, module: str) -> None:
    where = inside(clean, f"import {module} as m; print(m.__file__)")
    assert Path(where).is_relative_to(clean.parent.parent)


def test_the_client_says_in_one_line_that_there_is_no_daemon(clean: Path, tmp_path: Path) -> None:
    code = f"""
from powerd.client import Client
from powerd.errors import PowerdError
try:
    Client({str(tmp_path / "none.sock")!r}).snapshot()
except PowerdError as error:
    print(error.code.name, len(str(error).splitlines()))
"""
    assert inside(clean, code) == "unavailable 1"


def test_a_client_that_only_logs_does_not_raise(clean: Path, tmp_path: Path) -> None:
    code = f"""
from powerd.client import Client
client = Client({str(tmp_path / "none.sock")!r}, on_error="log")
with client.lease(sm_clock_mhz=1200, reason="test"), client.energy("step"):
    print("the step ran")
"""
    assert inside(clean, code) == "the step ran"


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    roots = {"powerd": ROOT, "powerd_policies": ROOT / "policies", "powerd_integrations": ROOT / "integrations"}
    listed = run("git", "-C", ROOT, "ls-files", *(base / package for package, base in roots.items())).stdout.splitlines()
    expected = {
        str((ROOT / line).relative_to(base))
        for line in listed
        for package, base in roots.items()
        if package in line.split("/")[:2]
    }
    assert {name for name in expected if Path(name).suffix not in NOT_SHIPPED} - shipped == set()


def test_shipped_data_is_found_in_a_wheel_and_in_a_checkout(clean: Path) -> None:
    code = """
from powerd.resources import CHECKOUT_PLACES, folder
for name in sorted(CHECKOUT_PLACES):
    for path in sorted(folder(name).rglob('*')):
        if path.is_file():
            print(name, path.relative_to(folder(name)))
"""
    installed = inside(clean, code)
    assert installed == run(sys.executable, "-I", "-c", code).stdout.strip()
    assert {"systemd powerd.service", "systemd powerd-hw.service", "systemd powerd.socket"} <= set(installed.splitlines())
    page = {"dashboards web/index.html", "dashboards web/js/app.js", "dashboards web/vendor/uPlot.LICENSE.txt"}
    assert page <= set(installed.splitlines()), "the web page works from a wheel"


def test_both_commands_are_installed(clean: Path) -> None:
    assert (clean.parent / "powerd").exists()
    assert (clean.parent / "powerctl").exists()
