"""The third environment, with the training frameworks (docs/dependencies.md): its interpreter, or why a test cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def torch_python() -> Path:
    """Its interpreter; without the environment a test is skipped, and fails where CI=true."""
    named = os.environ.get("POWERD_TORCH_VENV")
    folder = Path(named) if named else ROOT / ".venv-torch"
    found = folder / "bin" / "python"
    if not found.exists():
        reason = f"no environment with the frameworks at {folder} (make test makes it; POWERD_TORCH_VENV names another)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def source_path() -> str:
    """PYTHONPATH of this tree: the same code whichever environment runs it."""
    return os.pathsep.join(str(ROOT / part) for part in ("", "policies", "integrations"))
