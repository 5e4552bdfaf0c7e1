"""What a GPU shows in a few minutes: its tests, attention by shape, and the engine's steps.

Without a GPU the same code runs on tiny shapes in the Triton language's interpreter, so that
nothing is tried for the first time where time is short; its figures mean nothing and are not kept.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.cuda.attention import paged_attention
from tandem.models.attention import PackedBatch, Span
from tandem.requests.sequence import BlockTable
from tandem_bench import gpu_engine
from tandem_bench.gpu_engine import seconds
from tandem_bench.results import Results
from tandem_bench.tables import Cells, table
from tandem_runtime.paths import ROOT

_BLOCK_SIZE = 16
_MIB = 2**20
# Of the device, in a copy.
_COPIED_BYTES = 2**31
_TESTS = ("tests/cuda/test_sampling.py", "tests/cuda/test_paged_attention.py")
_TEST_SECONDS = 180


@dataclass(frozen=True)
class Layer:
    """The attention of a published model's layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class Load:
    """Equal sequences: how many, how many tokens of each are computed, and how many it has."""

    num_sequences: int
    num_queries: int
    context: int

    @property
    def name(self) -> str:
        """What a row of results is called by."""
        return f"{self.num_sequences} x {self.num_queries} tokens at {self.context}"


LAYERS = (
    Layer("Gemma 4 E2B, window", 8, 1, 256, 512),
    Layer("Gemma 4 E2B, full", 8, 1, 512),
    Layer("Gemma 4 31B, window", 32, 16, 256, 1024),
    Layer("Gemma 4 31B, full", 32, 4, 512),
    Layer("Llama 3 8B", 32, 8, 128),
)
LOADS = (
    Load(1, 1, 1024),
    Load(1, 5, 8192),
    Load(1, 5, 32768),
    Load(16, 5, 2048),
    Load(64, 1, 2048),
    Load(64, 5, 2048),
    Load(64, 5, 8192),
    Load(1, 512, 2048),
    Load(1, 512, 16384),
)
_TINY_LAYERS = (Layer("tiny, window", 4, 1, 32, 24), Layer("tiny, full", 4, 2, 64))
_TINY_LOADS = (Load(1, 1, 40), Load(2, 9, 50))


def run(output: Path) -> int:
    """Runs all parts and prints each result as soon as it is there.

    Args:
        output: the folder of the results.

    Returns:
        The exit status: that of the tests.
    """
    is_dry = not torch.cuda.is_available()
    if is_dry:
        print("no GPU: a dry run on tiny shapes; its figures mean nothing and are not kept")
    said = device()
    print(", ".join(f"{name}: {value}" for name, value in said.items()), flush=True)
    status = tests(is_dry)
    parts = {"attention": attention(is_dry), "engine": gpu_engine.run(is_dry)}
    text = f"# On a GPU\n\n{said}\n"
    for part, cells in parts.items():
        results = Results(output / f"{part}.json", said)
        results.cells = {}  # all is measured anew
        for name, cell in cells:
            print(f"{name}: {cell}", flush=True)
            results.cells[name] = cell
            if not is_dry:
                results.put(name, cell)
        text += f"\n## {part.capitalize()}\n\n{summary(results.cells)}"
        if not is_dry:
            (output / "README.md").write_text(text, encoding="utf-8")
    if is_dry:
        print(text)
    return status


def attention(is_dry: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Times of the kernel and of others, by layer and load."""
    layers, loads = (_TINY_LAYERS, _TINY_LOADS) if is_dry else (LAYERS, LOADS)
    rate = copy_rate(is_dry)
    print(f"a copy reads and writes {rate / 1e9:.0f} GB/s", flush=True)
    for layer in layers:
        for load in loads:
            yield f"{layer.name}: {load.name}", compare(layer, load, rate)


def device() -> dict[str, Any]:
    """What the figures hold for, beside the machine."""
    versions = {name: importlib.metadata.version(name) for name in ("triton", "torch")}
    if not torch.cuda.is_available():
        return {"gpu": "none", **versions}
    facts = torch.cuda.get_device_properties(0)
    capability = f"{facts.major}.{facts.minor}"
    return {"gpu": facts.name, "capability": capability, "cuda": torch.version.cuda, **versions}


def tests(is_dry: bool) -> int:
    """The kernel's own tests, in a process of their own; their exit status."""
    chosen = ["-k", "large and 256 or noise_has"] if is_dry else []
    path = os.pathsep.join([str(ROOT / "python_backend"), str(ROOT / "client")])
    environment = {**os.environ, "TRITON_INTERPRET": str(int(is_dry))}
    environment["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *_TESTS,
        *chosen,
    ]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=_TEST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {_TEST_SECONDS} s")
        return 1


def copy_rate(is_dry: bool) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = _MIB if is_dry else _COPIED_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=_device())
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source))


def compare(layer: Layer, load: Load, rate: float) -> dict[str, float]:
    """Microseconds of the kernel, of torch's operations as without it, and of SDPA on dense K/V.

    Args:
        rate: bytes a second of the memory.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    torch.manual_seed(0)
    num_blocks = -(-load.context // _BLOCK_SIZE)
    order = torch.randperm(load.num_sequences * num_blocks).view(load.num_sequences, -1).tolist()
    spans = [Span(load.num_queries, load.context, [BlockTable(blocks)]) for blocks in order]
    num_slots = load.num_sequences * num_blocks * _BLOCK_SIZE

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=_device())

    keys, values = (some(num_slots, layer.num_kv_heads, layer.head_dim) for _ in range(2))
    num_tokens = load.num_sequences * load.num_queries
    query = some(1, num_tokens, layer.num_heads, layer.head_dim).transpose(1, 2)
    scaling = layer.head_dim**-0.5

    def packed(has_kernel: bool) -> Callable[[], Tensor]:
        batch = PackedBatch(spans, _BLOCK_SIZE, dtype, _device())
        # In a dry run the wing is another's.
        batch.kernel = paged_attention(dtype) if has_kernel else None
        return lambda: batch.attend(query, keys, values, scaling, layer.window)

    seen = min(load.context, (layer.window or load.context) + load.num_queries - 1)
    shape = (load.num_sequences, layer.num_kv_heads, seen, layer.head_dim)
    dense_keys, dense_values = some(*shape), some(*shape)
    rows = some(load.num_sequences, layer.num_heads, load.num_queries, layer.head_dim)
    places = torch.arange(seen, device=_device())
    last = places[seen - load.num_queries :].unsqueeze(1)
    mask = places <= last
    if layer.window is not None:
        mask &= places > last - layer.window

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(
            rows, dense_keys, dense_values, attn_mask=mask, scale=scaling, enable_gqa=True
        )

    kernel, without = packed(True), packed(False)
    difference = (kernel().float() - without().float()).abs().max().item()
    size = 2 * load.num_sequences * seen * layer.num_kv_heads * layer.head_dim * dtype.itemsize
    took = seconds(kernel)
    return {
        "us_kernel": round(1e6 * took, 1),
        "us_without": round(1e6 * seconds(without), 1),
        "us_sdpa_dense": round(1e6 * seconds(sdpa), 1),
        "us_reading_kv": round(1e6 * size / rate, 1),
        "share_of_the_limit": round(size / rate / took, 3),
        "largest_difference": round(difference, 5),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def summary(cells: Cells) -> str:
    """A row for each shape."""
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    header = ["", *(name.replace("_", " ") for name in names)]
    return table(
        header, [[key, *(cell.get(name, "") for name in names)] for key, cell in cells.items()]
    )
