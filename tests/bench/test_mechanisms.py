"""The benchmark of single mechanisms: what is switched off is off, and nothing else."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

import tandem.cpu.packing
import tandem.models.invariance
from doubles import prompt_of
from tandem import Engine
from tandem_bench.mechanism_tables import summary
from tandem_bench.mechanisms import ALL, EAGER, GROUPS, VARIANTS, check
from tandem_bench.peers.tandem_without import requests, steady
from tandem_bench.switches import MECHANISMS, at_work, place, without
from tandem_bench.worker import WorkerError
from tandem_train.train import save
from tiny_assistants import engine_with, make_assistant
from tiny_engines import DEVICE, TinyModels

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="these mechanisms are for CPUs")

COMPILED = {"compiled pass", "compiled drafter step"}
Without = Callable[..., set[str]]


@pytest.fixture(scope="module")
def works_without(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Without]:
    """What works in an engine with some mechanisms switched off; each is made once."""
    folder = tmp_path_factory.mktemp("mechanisms")
    assistant, _ = make_assistant(tiny.verifier("gemma-3"))
    save(assistant, folder / "drafter", dtype=torch.float32)

    @cache
    def found(*names: str, **settings: Any) -> set[str]:
        # No other engine has a file of this folder open.
        verifier = shutil.copytree(
            tiny.verifier("gemma-3"), folder / "-".join(["v", *names, *settings])
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tandem.cpu.packing, "_INT8_SIZE", 1)  # tiny matrices too
            for name in names:
                for where, instead in MECHANISMS[name].instead.items():
                    patch.setattr(*place(where), instead)
            return set(at_work(engine_with(verifier, folder / "drafter", **settings)))

    with pytest.MonkeyPatch.context() as patch:
        # Whatever tiny products cost.
        patch.setattr(tandem.models.invariance, "_MAX_COST", math.inf)
        # What sets it stays set.
        for name in tandem.cpu.packing._KEPT_PRODUCTS:
            patch.setenv(name, "16")
        yield found


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in COMPILED])
def test_one_is_off_and_all_others_work(works_without: Without, name: str) -> None:
    whole = works_without()
    assert whole | {"likeliest in 8 bits"} == MECHANISMS.keys() - COMPILED
    if name not in whole:
        pytest.skip("this processor has no fast products of 8 bits")
    assert works_without(name) == whole - without([name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(COMPILED), "attention kernel"])
def test_graphs_are_off_alone_and_with_what_they_call(works_without: Without, name: str) -> None:
    whole = works_without(enforce_eager=False)
    assert whole >= COMPILED
    assert works_without(name, enforce_eager=False) == whole - without([name])


def test_what_is_not_there_can_not_be_switched_off() -> None:
    with pytest.raises(AttributeError, match="compile_all"):
        place("tandem.models.loading:compile_all")


def test_a_variant_that_is_not_what_it_should_be_is_not_measured() -> None:
    whole = {"exp sums", "fused norms", *COMPILED, "attention kernel"}
    check("attention kernel", whole, {"exp sums", "fused norms"})
    with pytest.raises(WorkerError, match=r"should not: \['exp sums'\].*should: \['fused norms'\]"):
        check("exp sums", whole, whole - {"fused norms"})


def test_each_variant_is_measured_beside_the_whole_engine() -> None:
    assert {name for names in GROUPS.values() for name in names} == VARIANTS.keys()
    assert sum(map(len, GROUPS.values())) == len(VARIANTS) + len(GROUPS) - 1
    assert all(names[0] == ALL for names in GROUPS.values())


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_tokens_are_counted_with_as_many_requests_in_flight(engines, drafter: str) -> None:
    engine: Engine = engines("gemma-3")
    running: list[int] = []
    begun = []

    def waiting() -> Any:
        for sequence in requests(
            engine, 3, [prompt_of(n) for n in (5, 9)], 12, drafter, {"temperature": 0.0}
        ):
            begun.append(sequence)
            running.append(sum(not each.is_finished for each in begun))
            yield sequence

    found = steady(engine, waiting(), 3, 60)
    assert 60 <= found["num_tokens"] < 60 + 3 * 9
    assert found["num_steps"] <= 20 if drafter == "none" else found["num_steps"] < 20
    assert found["started_at"] < found["ended_at"]
    assert [sequence.params.max_tokens for sequence in begun[:4]] == [4, 8, 12, 12]
    assert len({sequence.seed for sequence in begun}) == len(begun) > 5
    assert running[2:] == [3] * (len(begun) - 2)
    assert not engine.has_work


def variants(**speeds: float) -> dict[str, Any]:
    return {
        name.replace("_", " "): {"tokens_per_second": s, "steps_per_second": s / 2, "rss_mb": s}
        for name, s in speeds.items()
    }


def test_ratios_are_within_rounds() -> None:
    """Memory was half as fast in the second round; over all, the medians would say 0.8."""
    cells: dict[str, Any] = {
        f"kernels: none greedy c16 r{number}": {
            "foreign_cpu_share": 0.0,
            "variants": variants(everything=whole, exp_sums=less),
        }
        for number, (whole, less) in enumerate(((100, 99), (50, 48), (90, 72)))
    }
    cells["passes: none greedy c16 r0"] = {
        "foreign_cpu_share": 0.2,
        "variants": variants(everything=100, attention_kernel=20, nothing_compiled=40),
    }
    shown = summary(cells)
    assert EAGER == "nothing compiled"
    assert "| without | none greedy, 16 | MB |" in shown
    assert "| exp sums | 0.960 ±10% | -1 |" in shown
    assert "| attention kernel | 0.200* | -80 |" in shown
    assert "| attention kernel, if nothing is compiled | 0.500* | -20 |" in shown
    assert "| group kernels | 90.0 |" in shown
