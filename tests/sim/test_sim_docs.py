"""docs/simulation.md names every fault and model, and quotes errors that the calibration prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerd.sim import calibration
from powerd.sim.faults import KINDS
from powerd.sim.kernels import GENERIC
from powerd.sim.models import MODELS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "simulation.md").read_text()


def test_every_fault_model_and_kernel_is_documented() -> None:
    for kind in KINDS:
        assert f"| `{kind}` |" in TEXT
    for kernel in GENERIC:
        assert f"`{kernel}`" in TEXT
    for key in MODELS:
        assert key in TEXT or (key == "a100-sxm-500w" and "-500w" in TEXT)


def test_quoted_errors_are_the_printed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibration.main() == 0
    out = capsys.readouterr().out
    rows = [line for line in TEXT.splitlines() if line.startswith(("| A100-SXM forward", "| A100-SXM back", "| A40 "))]
    assert len(rows) == 4
    for row in rows:
        for cell in row.strip("|").split("|")[1:]:
            for quoted in cell.split(","):
                mean, most = quoted.split("/")
                assert f"{float(mean):8.2f} /{float(most):5.2f}" in out, quoted
    for line in ("200 W  time 1.463 modelled 1.465  energy 0.986 modelled 0.987", "200 W  time 1.173 modelled 1.144"):
        assert line in out
