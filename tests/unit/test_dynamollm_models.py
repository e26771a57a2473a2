"""Engine models: the shipped ones are what their builder makes, clocks and limits do what they must, bad files are refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from powerd.errors import RequestError
from powerd.resources import folder
from powerd.sim import enginemodels
from powerd_policies.dynamollm import fit, models
from powerd_policies.dynamollm.__main__ import main
from powerd_policies.dynamollm.engine_model import EngineModel

LLM = folder("profiles") / "llm"
DATA, WATTS = LLM / "splitwise_llama2-70b.csv", LLM / "mlenergy_v2.csv"
ROWS = fit.latencies(DATA.read_text())
POWERS = fit.of_gpu(fit.batch_powers(WATTS.read_text()), fit.H100)


def h100(**assumed: Any) -> EngineModel:
    return fit.build(ROWS, fit.H100, assumed=fit.Assumptions(**assumed), batches=POWERS)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_the_shipped_model_is_what_the_builder_makes_of_the_shipped_data(gpu: str, tmp_path: Path) -> None:
    out = tmp_path / "made.csv"
    assert main(["build", "--data", str(DATA), "--watts", str(WATTS), "--gpu", gpu, "-o", str(out)]) == 0
    shipped = enginemodels.load(f"llama2-70b_{gpu}")
    made = models.load(out)
    assert (made.name, made.gpu, made.kv_tokens, made.origin) == (shipped.name, shipped.gpu, shipped.kv_tokens, shipped.origin)
    assert made.table.keys() == shipped.table.keys()
    for key, row in shipped.table.items():
        for name in models.FIELDS:  # another machine's arithmetic may differ in the last bits
            assert getattr(made.table[key], name) == pytest.approx(getattr(row, name), rel=1e-9)


def test_what_is_written_is_read_back_to_the_last_bit() -> None:
    for name in enginemodels.names():
        model = enginemodels.load(name)
        assert models.parse(models.dump(model)) == model


def test_an_unknown_model_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(RequestError, match="no engine model 'gpt-5'") as refused:
        enginemodels.load("gpt-5")
    assert "llama2-70b_h100" in refused.value.hint


def test_the_papers_parallelisms_and_its_range_of_clocks_are_there() -> None:
    model = enginemodels.load()
    assert model.tps == (2, 4, 8)
    assert all(model.clocks_mhz(tp) == fit.H100.clocks_mhz for tp in model.tps)
    assert (max(fit.H100.clocks_mhz), min(fit.H100.clocks_mhz)) == (1980, 810)
    assert all((clock - 345) % 15 == 0 for clock in fit.H100.clocks_mhz), "the driver knows steps of 15 MHz"


def test_tp2_has_next_to_no_room_for_context() -> None:
    # 80 GB x TP x 0.9 - 138 GB of weights, in tokens of 320 KiB.
    assert enginemodels.load().kv_tokens == {2: 18_310, 4: 457_763, 8: 1_336_669}


@pytest.mark.parametrize("gpu", [fit.H100, fit.A100], ids=lambda gpu: gpu.name)
def test_a_lower_clock_is_never_faster_and_never_draws_more(gpu: fit.Gpu) -> None:
    model = enginemodels.load(f"llama2-70b_{gpu.name}")
    for tp in model.tps:
        rows = [model.table[tp, clock] for clock in model.clocks_mhz(tp)]
        for high, low in itertools.pairwise(rows):
            for tokens, batch in ((0, 1), (0, 64), (512, 0), (2048, 32)):
                assert low.iteration_s(tokens, batch) >= high.iteration_s(tokens, batch)
            assert low.prefill_w <= high.prefill_w
            assert low.decoding_w(16) < high.decoding_w(16)
            assert gpu.off_w < low.idle_w < high.idle_w <= gpu.context_w


def test_a_prefill_at_its_power_limit_gains_nothing_from_a_higher_clock() -> None:
    top, allowed = fit.H100.limit_w * 0.95, h100()
    assert allowed.table[4, 1980].prefill_w == pytest.approx(top, abs=0.1)
    assert all(row.prefill_w <= top + 0.1 for row in allowed.table.values())
    tight = fit.build(ROWS, fit.H100, assumed=fit.Assumptions(limit_ratio=0.7), batches=POWERS)
    assert tight.table[4, 1980].prefill_token_s == pytest.approx(tight.table[4, 1755].prefill_token_s)
    assert tight.table[4, 1980].decode_fixed_s < tight.table[4, 1755].decode_fixed_s, "decode is below the limit"


@pytest.mark.parametrize(("batch", "ratio"), [(16, 1.25), (64, 1.38)])
def test_decode_at_half_the_clock_is_as_slow_as_suggested(batch: int, ratio: float) -> None:
    full = h100().table[4, 1980]
    half = fit.at_clock(full, 0.5, fit.H100, fit.Assumptions(), 0.4)
    assert half.iteration_s(0, batch) / full.iteration_s(0, batch) == pytest.approx(ratio, abs=0.03)


def test_at_the_worst_end_decode_slows_as_prefill_does() -> None:
    worst = h100(sensitivity=0.0)
    slower = worst.table[4, 1005].decode_fixed_s / worst.table[4, 1980].decode_fixed_s
    assert slower == pytest.approx(0.03 + 0.97 * 1980 / 1005)
    better = h100(sensitivity=1.2)
    assert better.table[4, 1005].decode_fixed_s < h100().table[4, 1005].decode_fixed_s < worst.table[4, 1005].decode_fixed_s


def test_the_knee_moves_where_slower_stops_saving() -> None:
    def best(model: EngineModel) -> int:
        joules = {clock: model.table[4, clock].iteration_j(2048, 0) for clock in model.clocks_mhz(4)}
        return min(joules, key=lambda clock: joules[clock])

    assert best(h100(knee=0.65)) < best(h100(knee=0.9))


def test_measurements_that_cannot_have_fitted_the_memory_are_left_out() -> None:
    room = enginemodels.load().kv_tokens[2]
    kept = fit.usable(ROWS, fit.H100, fit.LLAMA2_70B, 2, fit.Assumptions())
    assert {r.batch for r in kept} == {1, 2, 4, 8, 16}, "batches of 32 and 64 took another path when they were measured"
    assert all(r.context_tokens <= room for r in kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("4,1980,", "4,1980,x"), r"line \d+: prefill_fixed_s is 'x.*no number"),
        (("4,1980,", "4,1980,-"), r"line \d+: prefill_fixed_s is -.*"),
        (("4,1980,", "4.5,1980,"), r"line \d+: tp 4.5"),
        (("4,1905,", "4,1980,"), r"line \d+: TP4 at 1980 MHz is there twice"),
        (("tp,clock_mhz,prefill_fixed_s", "tp,clock_mhz,prefill"), r"line 7: the columns are tp,clock_mhz,prefill,"),
        (('# gpu = "h100"\n', ""), "the header lacks gpu"),
        (("# off_w = 72.0", "# off_w = "), "is not TOML"),
        (("4 = 457763, ", ""), "kv_tokens does not hold TP4"),
        (("4 = 457763", "4 = true"), "kv_tokens is"),
    ],
)
def test_a_bad_engine_model_is_refused_with_its_place(change: tuple[str, str], said: str) -> None:
    good = models.dump(enginemodels.load())
    assert change[0] in good
    with pytest.raises(RequestError, match=said):
        models.load(good.replace(*change, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("prompt_time", "prompt"), "line 1 lacks the column 'prompt_time'"),
        (("196.2532191537321", "nan"), "line 2: prompt_time is nan"),
        (("196.2532191537321", "-1"), "line 2: prompt_time is -1"),
        (("54.87951193752838", "quick"), "line 2: token_time is 'quick'"),
        (("llama2-70b,a100-80gb,512,1,128,", "llama2-70b,512,1,128,"), "line 2 has 10 cells"),
    ],
)
def test_bad_measurements_are_refused_with_their_place(
    change: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(DATA.read_text().replace(*change, 1))
    assert main(["build", "--data", str(bad)]) == 2
    assert said in capsys.readouterr().err


def test_data_without_the_gpu_are_refused_with_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = tmp_path / "a100.csv"
    only.write_text("".join(line for line in DATA.read_text().splitlines(keepends=True) if "h100" not in line))
    assert main(["build", "--data", str(only), "--gpu", "h100"]) == 2
    assert "nothing of h100-80gb" in capsys.readouterr().err


def test_a_sweep_starts_from_what_ships_and_changes_only_what_it_says() -> None:
    shipped = enginemodels.load()
    same, worst = (enginemodels.assuming(fit.Assumptions(sensitivity=end)) for end in (1.0, 0.0))
    assert same.table[4, 1005].decode_fixed_s == pytest.approx(shipped.table[4, 1005].decode_fixed_s)
    assert worst.table[4, 1980] == same.table[4, 1980], "at the highest clock nothing is assumed about lower ones"
    assert worst.table[4, 1005].decode_fixed_s > 1.5 * same.table[4, 1005].decode_fixed_s
    with pytest.raises(RequestError, match="no measurements of 'b200'"):
        enginemodels.assuming(fit.Assumptions(), "b200")
