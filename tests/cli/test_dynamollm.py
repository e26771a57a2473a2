"""powerctl dynamollm: a trace goes in, a report, a table and a picture come out; what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from powerd.cli import main
from powerd.sim.replay import session, trace


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes of the published hour."""
    path = tmp_path_factory.mktemp("trace") / "part.csv"
    trace.write(path, trace.read(session.shipped_hour()).between(600, 720))
    return path


def powerctl(*arguments: str | Path) -> int:
    return main._run([str(argument) for argument in ("dynamollm", *arguments)])


def test_a_replay_writes_what_it_shows(part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "report.json", tmp_path / "report.png"
    names = ("singlepool", "multipool", "scaleinst", "scaleshard", "scalefreq", "beststatic", "dynamollm")
    code = powerctl("replay", "--trace", part, "--load", "3", "--policies", ",".join(names), "-o", out, "--plot", picture, "-v")
    said = capsys.readouterr()
    assert code == 0, said.err
    made = json.loads(out.read_text())
    assert list(made["policies"]) == list(names)
    assert len({entry["requests"] for entry in made["policies"].values()}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert f"{made['policies'][name]['energy_kwh']:.4g} kWh" in said.out
    assert "modelled" in said.out
    assert str(out) in said.err


def test_json_is_the_report_alone(part: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert powerctl("replay", "--trace", part, "--policies", "singlepool", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["policies"]["singlepool"]["slo_attainment"] > 0.99
    assert made["scenario"]["cluster"] == {"nodes": 12, "gpus_per_node": 8}


def test_what_is_generated_can_be_replayed_after_its_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, past = tmp_path / "now.csv.gz", tmp_path / "past.csv.gz"
    assert powerctl("generate", "-o", past, "--days", "0.2", "--rate", "3", "--seed", "8") == 0
    assert powerctl("generate", "-o", now, "--days", "0.005", "--rate", "30", "--seed", "9") == 0
    assert powerctl("replay", "--trace", now, "--history", past, "--policies", "singlepool,dynamollm", "--json") == 0
    made = json.loads(capsys.readouterr().out)["policies"]
    assert made["dynamollm"]["energy_kwh"] < made["singlepool"]["energy_kwh"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--policies", "dynamolm"], 2, "there is no policy 'dynamolm' (did you mean 'dynamollm'?)"),
        (["--policies", ","], 2, "no policies"),
        (["--load", "0"], 2, "load 0 is not above 0"),
        (["--scenario", "none.toml"], 78, "cannot read none.toml"),
        (["--trace", "none.csv"], 2, "cannot read none.csv"),
        (["--plot", "report.bmp"], 2, "a picture ends in"),
    ],
)
def test_a_wrong_call_is_one_line(
    arguments: list[str], code: int, said: str, part: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert powerctl("replay", "--trace", part, *arguments) == code
    heard = capsys.readouterr()
    assert said in heard.err
    assert heard.err.count("\n") == 1
    assert heard.out == ""
