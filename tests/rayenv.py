"""The fourth environment, with Ray and gRPC (docs/dependencies.md): its interpreter, or why a test cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torchenv import ROOT, source_path

__all__ = ["ROOT", "ray_python", "source_path"]


def ray_python() -> Path:
    """Its interpreter; without the environment a test is skipped, and fails where CI=true."""
    named = os.environ.get("POWERD_RAY_VENV")
    folder = Path(named) if named else ROOT / ".venv-ray"
    found = folder / "bin" / "python"
    if not found.exists():
        reason = f"no environment with Ray at {folder} (make test makes it; POWERD_RAY_VENV names another)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
