"""results.md: sections are replaced one by one, and every figure stands beside its command."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Report, percentile, write


def report(name: str, value: float) -> Report:
    made = Report(name, f"about {name}", simulated=True)
    made.add("p50", value, "ms", "< 1")
    made.notes.append("a note")
    return made


def test_writing_one_section_leaves_the_others(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write([report("first", 1.0), report("second", 2.0), report("third", 3.0)], page)
    write([report("second", 22.0)], page)
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {name}: about {name} on the simulated driver" for name in ("first", "second", "third")
    ]
    assert [f"| p50 | {v} | ms | < 1 |" in text for v in (1, 22, 3, 2)] == [True, True, True, False]
    assert text.count("`python -m benchmarks second`") == 1
    before = text
    write([report("second", 22.0)], page)
    assert page.read_text().replace(" UTC", "")[:40] == before.replace(" UTC", "")[:40]


def test_percentiles_are_measured_values() -> None:
    assert [percentile(list(range(1, 101)), p) for p in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([7.0], 0.99) == 7.0


def test_the_command_prints_json_and_refuses_unknown_names() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "energy", "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["simulated"] is True
    assert told["command"] == "python -m benchmarks energy"
    covered = [row["value"] for row in told["rows"] if row["what"].endswith("covered")]
    assert len(covered) == 2
    assert min(covered) >= 95
    wrong = subprocess.run([sys.executable, "-m", "benchmarks", "enrgy"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert "energy" in wrong.stderr
