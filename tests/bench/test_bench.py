"""The benchmark: its arithmetic, and the engine's part as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tandem import Engine
from tandem_bench import exactness, figures, invariance, profile, report, tables, windows
from tandem_bench.arrivals import poisson
from tandem_bench.figures import Trace
from tandem_bench.invariance import DTYPES, Job, Way, compare, ways
from tandem_bench.results import Results, read
from tandem_bench.settings import Settings, turned
from tandem_bench.workload import prompt_of_length, read_prompts, repeat_to_fill
from tandem_runtime.paths import ROOT
from tiny_engines import TinyModels

SCRIPT = ROOT / "scripts" / "bench.py"


def test_latencies_come_from_when_tokens_came() -> None:
    trace = Trace(sent=1.0, times=[1.5, 2.0, 4.0], counts=[1, 2, 2], token_ids=[7] * 5)
    assert trace.time_to_first_token == 0.5
    assert trace.time_per_output_token == 2.5 / 4
    assert Trace(0.0, [1.0], [1], [7]).time_per_output_token is None
    found = figures.summary([trace, trace], seconds=4.0)
    assert found["tokens_per_second"] == 2.5
    assert found["ttft_ms"] == {"p50": 500, "p95": 500, "p99": 500}
    assert found["tpot_ms"]["p50"] == 625


def test_throughput_is_that_while_new_requests_came() -> None:
    """Two slots: the last request is sent at 4, when the third has brought half of its tokens."""
    traces = [
        Trace(sent, [first, last], [1, 9], [])
        for sent, first, last in ((0, 1, 3), (0, 1, 4), (3, 3, 5), (4, 5, 9))
    ]
    found = figures.sustained(traces)
    assert found == {"tokens_per_second": 25 / 4, "mean_in_flight": 2.0}
    assert figures.sustained(traces[:2]) == {"tokens_per_second": 5.0, "mean_in_flight": 1.75}


def test_percentiles_lie_between_neighbours() -> None:
    assert figures.percentile([4, 1, 3, 2], 50) == 2.5
    assert figures.percentile([1, 2], 95) == pytest.approx(1.95)
    assert figures.percentile([3], 99) == 3
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 50)


def test_a_ratio_is_one_of_medians() -> None:
    assert figures.ratio([10, 30, 100], [15, 14, 1000]) == 2
    assert figures.spread([9, 10, 12]) == pytest.approx(0.3)


def test_answers_are_compared_token_by_token() -> None:
    found = figures.agreement([[1, 2, 3], [1, 2, 3], [4]], [[1, 2, 3], [1, 9, 3], [5]])
    assert found["num_answers"] == 3
    assert found["num_equal"] == 1
    assert found["first_divergence_least"] == 0
    assert found["first_divergence_median"] == 0.5


def test_prompts_are_mixed_and_fill_whole_rounds() -> None:
    prompts = read_prompts()
    assert len(prompts) == 40
    kinds = {
        entry["prompt"]: entry["kind"]
        for entry in map(json.loads, (ROOT / "prompts/held_out.jsonl").read_text().splitlines())
    }
    assert len({kinds[prompt] for prompt in prompts[:8]}) == 8
    assert repeat_to_fill([1, 2, 3], 2) == [1, 2, 3, 1]
    assert repeat_to_fill([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert prompt_of_length([[1, 2], [3]], 5, offset=1) == [3, 1, 2, 3, 1]
    assert turned(["a", "b", "c"], 4) == ["b", "c", "a"]


def test_arrivals_have_their_rate() -> None:
    times = poisson(4.0, 2000)
    assert times == sorted(times)
    assert times[-1] / 2000 == pytest.approx(0.25, rel=0.1)
    assert poisson(4.0, 10) == times[:10]


def test_results_go_on_only_under_the_same_conditions(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    Results(path, {"num_prompts": 4}).put("a", {"x": 1})
    same = Results(path, {"num_prompts": 4})
    same.put("b", [1, 2])
    assert list(read(path)["cells"]) == ["a", "b"]
    other = Results(path, {"num_prompts": 5})
    assert other.dropped == ["num_prompts"]
    assert not other.cells
    path.write_text(path.read_text().replace('"cores": ', '"cores": 1'))
    assert Results(path, {"num_prompts": 4}).dropped == ["cores"]
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"part\.json doesn't hold results"):
        Results(path, {})


def cell(speed: float, foreign: float = 0.0) -> dict[str, Any]:
    return {"tokens_per_second": speed, "foreign_cpu_share": foreign}


def test_tables_show_medians_ratios_and_noise() -> None:
    cells = {
        "Tandem mtp c1 r0": cell(90),
        "Tandem mtp c1 r1": cell(110),
        "vLLM c1 r0": cell(50, foreign=0.2),
        "vLLM c8 r0": cell(80),
        "reference": [[1, 2]],
    }
    rounds = tables.by_round(cells)
    assert tables.grid(rounds, tables.speed) == (
        "| concurrency | 1 | 8 |\n"
        "| --- | ---: | ---: |\n"
        "| Tandem mtp | 100.0 (±10%) |  |\n"
        "| vLLM | 50.0* | 80.0 |\n"
    )
    assert "| Tandem mtp / vLLM | 2.00 |  |" in tables.ratios(rounds, "Tandem", "HF|vLLM")


def test_what_triton_costs_is_compared_within_each_round() -> None:
    """Memory was half as fast in the second round; over all, the medians would say 0.8."""
    cells = {
        f"{way} none c8 r{number}": {"tokens_per_second": speed, "ttft_ms": {"p50": first}}
        for way, *found in (
            ("engine alone", (100, 30), (50, 60), (90, 40)),
            ("through Triton", (99, 34), (48, 70), (72, 45)),
        )
        for number, (speed, first) in enumerate(found)
    }
    shown = tables.triton(cells)
    assert "| none, 8 | 90.0 (±28%) | 72.0 (±35%) | 0.960 | 0.990, 0.960, 0.800 | +5.0 |" in shown


def test_the_table_is_put_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nb\n")
    report.insert(path, "new\n")
    report.insert(path, "new\n")
    assert path.read_text() == "a\n<!-- benchmark -->\nnew\n<!-- /benchmark -->\nb\n"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        report.insert(path, "new\n")


def write_model(tiny: TinyModels, directory: Path) -> None:
    model = {
        "verifier": str(tiny.verifier("gemma-3")),
        "dtype": "float32",
        "enforce_eager": True,
        "drafters": {"ngram": {"num_speculative_tokens": 3, "min_ngram_size": 1}},
    }
    (directory / "model.json").write_text(json.dumps(model))


def bench(part: str, directory: Path, *options: str) -> list[str]:
    settings = ["--config", str(directory / "model.json"), "--output", str(directory / "out")]
    load = ["--prompts", "2", "--max-tokens", "6", "--drafters", "none", "ngram", "-c", "1", "2"]
    return [sys.executable, str(SCRIPT), part, *settings, *load, *options]


@pytest.mark.slow
def test_answers_are_compared_in_every_way(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped does what is left."""
    write_model(tiny, tmp_path)
    settings = Settings(
        tmp_path / "model.json",
        tmp_path / "out",
        num_prompts=2,
        max_tokens=6,
        concurrencies=(1, 2),
        drafters=("none", "ngram"),
    )
    tried: list[str] = []

    def stop(engine: Engine, settings: Settings, way: Way, *rest: Any) -> dict[str, int]:
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(way.name)
        return compare(engine, settings, way, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(invariance, "compare", stop)
        with pytest.raises(KeyboardInterrupt):
            invariance.run(settings)
    kept = read(tmp_path / "out" / "invariance.json")["cells"]
    assert list(kept) == [DTYPES[0]]
    invariance.run(settings)
    cells = read(tmp_path / "out" / "invariance.json")["cells"]
    names = [way.name for way in ways(["ngram"], 1)]
    assert list(kept[DTYPES[0]]) == names[:2]
    assert list(cells) == list(DTYPES)
    for cell in cells.values():
        assert list(cell) == names
        found = {(each["same"], each["answers"]) for way in cell.values() for each in way.values()}
        assert found == {(2, 2)}
    report.run(tmp_path / "out", readme=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| preempted, temperature 0.8 | 2/2 same | 2/2 same |" in text


@pytest.mark.slow
def test_hits_and_preemptions_do_happen(tiny: TinyModels, tmp_path: Path) -> None:
    """Else nothing would be tried."""
    write_model(tiny, tmp_path)
    settings = Settings(tmp_path / "model.json", max_tokens=64)
    jobs = [Job([3 + n] * (20 + n), n, [0] * 64) for n in range(16)]
    *_, hits, of_answers, preempted = ways(["ngram"], longest=36 + 64)
    assert hits.engine == of_answers.engine
    engine = Engine(settings.engine_config(max_num_seqs=16, **hits.engine))
    for way in (hits, of_answers):
        assert compare(engine, settings, way, jobs, 0.0)["tokens_hit"] > 0
    engine = Engine(settings.engine_config(max_num_seqs=16, **preempted.engine))
    assert compare(engine, settings, preempted, jobs, 0.0)["preemptions"] > 0


@pytest.mark.slow
def test_both_kinds_are_measured_in_turns(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tiny, tmp_path)
    for name, value in {"_PROMPTS": (50,), "_CONCURRENCIES": (1, 2), "_TURNS": 2}.items():
        monkeypatch.setattr(exactness, name, value)
    settings = Settings(tmp_path / "model.json", tmp_path, drafters=("none", "ngram"))
    exactness.run(settings)
    cells = read(tmp_path / "exactness.json")["cells"]
    assert len(cells) == 1 + 2 * 2
    for cell in cells.values():
        assert cell["on / off"] == pytest.approx(cell["on"] / cell["off"], abs=0.02)
    assert "ngram, 2 at a time" in exactness.summary(cells)


@pytest.mark.slow
def test_windows_save_memory(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes stored, what runs at once in as many, and a chat that hits at every turn's end."""
    model = {"verifier": str(tiny.verifier("gemma-3")), "dtype": "float32", "block_size": 4}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**model, "enforce_eager": True, "max_num_batched_tokens": 16}))
    for name, value in {
        "_NUM_STORED": 3,
        "_STORED": 200,
        "_WRITTEN": 60,
        "_CACHE_TOKENS": 768,
        "_PROMPT": 120,
        "_ANSWER": 60,
        "_NUM_TURNS": 5,
        "_TURN": 40,
    }.items():
        monkeypatch.setattr(windows, name, value)
    monkeypatch.setattr(windows, "_LONGEST", 256)
    settings = Settings(path, rounds=1)
    monkeypatch.setattr(Settings, "prompts", lambda _: [[3 + n % 350 for n in range(500)]])
    found = windows.stored(settings)
    assert found["mib_used_after"] < 0.6 * found["mib_used_before"]
    found = windows.served(settings)
    assert found["mib_after"] <= found["mib_before"]
    assert found["most_at_once_after"] > found["most_at_once_before"]
    found = windows.chat(settings)
    assert found["least_share_of_a_turn_found_after"] > 0.8


@pytest.mark.slow
def test_a_profile_is_the_median_of_its_rounds(tiny: TinyModels, tmp_path: Path) -> None:
    write_model(tiny, tmp_path)
    profile.run(
        Settings(
            tmp_path / "model.json",
            tmp_path / "out",
            num_prompts=2,
            max_tokens=6,
            concurrencies=(1,),
            drafters=("ngram",),
        )
    )
    cell = read(tmp_path / "out" / "profile.json")["cells"]["ngram c1"]
    share = cell["share_outside_products"]
    assert share == pytest.approx(1 - cell["products_ms"] / cell["step_ms"], abs=0.01)
    assert cell["shares"] == sorted(cell["shares"])
    assert cell["shares"][1] == share


@pytest.mark.slow
def test_the_engine_part_goes_on_where_it_was_stopped(tiny: TinyModels, tmp_path: Path) -> None:
    write_model(tiny, tmp_path)
    path = tmp_path / "out" / "engine.json"
    with subprocess.Popen(bench("engine", tmp_path, "--rounds", "100000")) as process:
        while not (path.exists() and "ngram c2 r3" in path.read_text()):
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    stopped = read(path)["cells"]
    done = max(int(key.rpartition(" r")[2]) for key in stopped if key != "ceilings")
    subprocess.run(bench("engine", tmp_path, "--rounds", str(done + 2)), check=True, timeout=300)
    finished = read(path)["cells"]
    assert len(finished) == 1 + 4 * (done + 2)
    assert {key: finished[key] for key in stopped} == stopped
    for drafter in ("none", "ngram"):
        measured = finished[f"{drafter} c2 r0"]
        assert measured["num_tokens"] == 12
        assert measured["against_plain_alone"]["num_equal"] == 2
        assert set(measured["phases_ms"]) == {"schedule", "draft", "verify", "accept", "commit"}
    assert finished["none c1 r0"]["num_steps"] == 12
    subprocess.run(bench("report", tmp_path), check=True, timeout=300)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## The engine alone" in text
    assert "| ngram, 2 |" in text
