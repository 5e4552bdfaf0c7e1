"""The sheet of limits: it comes to its end, and its launches are those of a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cuda_wing import HostTools, InterpretedWing, cuda_wing
from tandem import Engine
from tandem.cuda import sampling
from tandem.cuda.attention import PagedAttention
from tandem.models.checkpoint import load_model
from tandem.rounds.device import DeviceRound
from tandem_bench.gpu_engine import TINY, TINY_CHANGES, Pair, configs
from tandem_bench.gpu_roofline import MODELS, small_sizes
from tandem_bench.gpu_sheet import counts_table, main_table, run
from tandem_bench.gpu_work import Work, launches_of, work_of
from tandem_bench.meta_round import Load, MetaRound, fused, of_shape
from tandem_runtime.paths import ROOT
from tiny_engines import Engines, TinyModels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
LOAD = Load(3, 4)


class KernelTools(HostTools):
    """The wing's kernels, for whose results something stands that can be an index."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(PagedAttention(), self._choose, device)

    def _choose(self, *columns: Any, token_ids: Any) -> Tensor:
        chosen = sampling.choose(*columns, token_ids)
        with _disable_current_modes():
            return chosen.zero_()


class FusedWing(InterpretedWing):
    """Lays models out as on a GPU; passes at load have the attention of torch's operations."""

    def attention_kernel(self, dtype: torch.dtype) -> None:
        return None

    def round_tools(self, dtype: torch.dtype) -> KernelTools:
        return KernelTools(self._device)


def programs_of(engine: Engine) -> dict[str, Callable[[], Any]]:
    assert isinstance(engine.round, DeviceRound)
    programs = engine.round.programs
    size = programs.pass_size(LOAD.num_rows, LOAD.num_rows)
    verified: list[Any] = []
    return {
        "draft": lambda: programs.draft(0, LOAD.num_sequences, LOAD.num_drafts),
        "verify": lambda: verified.append(programs.verify(size)),
        "accept": lambda: programs.accept(size, verified.pop(), adjusts=False),
    }


@pytest.mark.parametrize("verifier", ["gemma-4-E2B", "gemma-4-31B"])
def test_launches_are_those_of_a_real_engine(
    engines: Engines, tiny: TinyModels, verifier: str
) -> None:
    """Each program, by operation: loaded as in service, against shapes alone."""
    cpu = torch.device("cpu")
    paths = tiny.verifier(verifier), tiny.assistant(verifier)
    models = [load_model(str(path), torch.float32, cpu).config for path in paths]
    made = fused(*models, torch.float32, LOAD.num_drafts)  # type: ignore[arg-type]
    with cuda_wing(FusedWing):
        engine = engines.make(verifier, mtp=True)
        expected = launches_of(programs_of(engine))
    assert expected["verify"]["rms_norm"] > 4 * 6
    assert launches_of(made.programs(LOAD)) == expected


@pytest.mark.parametrize(
    "pair", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)], ids=lambda pair: pair.name
)
def test_launches_do_not_depend_on_width(pair: Pair) -> None:
    """Of the published depth and width, and of the small width by which they are counted."""
    found = [
        launches_of(of_shape(*configs(pair, *each), torch.bfloat16, 1).programs(Load(4, 1)))
        for each in (({}, {}), (small_sizes(pair), TINY_CHANGES))
    ]
    assert found[0] == found[1]


def shaped(**sizes: Any) -> MetaRound:
    pair = MODELS[0]
    layers = {"num_hidden_layers": 10, "layer_types": pair.verifier["layer_types"][:10]}
    tiny = {**TINY, **layers, "num_kv_shared_layers": 5, **sizes}
    return of_shape(*configs(pair, tiny, TINY_CHANGES), torch.bfloat16, 2)


def work(load: Load, context: int, **sizes: Any) -> dict[str, Work]:
    return work_of(shaped(**sizes), load, context)


def test_bytes_and_products_are_those_of_the_shapes() -> None:
    """Weights once a pass, K/V by window, products and logits by row."""
    one, many = work(Load(1, 0), 100), work(Load(4, 0), 100)
    model = shaped().verifier
    matrices = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    matrices.append(model.model.per_layer_model_projection.weight)
    weights = 2 * sum(weight.numel() for weight in matrices)
    assert 0 <= one["verify"].bytes["weights"] - weights < 0.05 * weights  # rows of embeddings
    # Of one KV head: windows of 24 tokens by 16 numbers in 8 layers, 101 by 32 in the other two.
    assert one["verify"].bytes["kv"] == 2 * 2 * (8 * 24 * 16 + 2 * 101 * 32)
    assert many["verify"].bytes["kv"] == 4 * one["verify"].bytes["kv"]
    assert many["accept"].flops == 4 * one["accept"].flops == 4 * 2 * 32 * 384
    assert many["accept"].bytes["logits"] == 4 * one["accept"].bytes["logits"]


def test_the_sheet_comes_to_its_end(tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 5, "layer_types": MODELS[0].verifier["layer_types"][:5]}
    sizes = {**MODELS[0].verifier, **layers, "num_kv_shared_layers": 0}
    pair = Pair("tiny", {**sizes, **TINY}, MODELS[0].assistant, (0.5,), "assumed", TINY_CHANGES)
    run(tmp_path, 100, [pair], [1, 2])
    page = (tmp_path / "roofline.md").read_text()
    assert page.startswith("# Reckoned, not measured")
    assert "| mtp, 2: verify |" in page
    (model,) = json.loads((tmp_path / "roofline.json").read_text())["models"].values()
    for step in model["steps"].values():
        for card in step["cards"].values():
            assert card["ms"]["limit"] <= card["ms"]["graphs"] <= card["ms"]["eager"]


def test_the_page_has_the_tables_of_the_sheet() -> None:
    found = json.loads((ROOT / "benchmarks/gpu/roofline.json").read_text())
    page = (ROOT / "docs/gpu.md").read_text()
    assert counts_table(found) in page
    assert main_table(found) in page
