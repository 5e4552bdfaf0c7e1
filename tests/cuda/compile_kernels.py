"""Compiles the kernels for GPUs that need not be there; a JSON line for each.

`compile_kernels.py 80` prints registers, bytes of stack and of shared memory for a compute
capability; `gfx942` in its place is a GPU of AMD's, for which causal attention alone is compiled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tandem.cuda import attention, products, sampling, sampling_kernels
from tandem.cuda.attention import Tiles
from tandem.cuda.kernels import (
    attend_parts,
    gate,
    join_parts,
    rms_norm,
    rotate,
    write_kv,
)
from tandem.cuda.product_kernels import multiply

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Query heads that share a KV head, and the size of a head: Llama and Qwen; Gemma 3; Gemma 4 E2B and
# E4B, its 31B and 26B, with layers that have a window and others.
_SHAPES = ((4, 64), (1, 80), (4, 128), (8, 128), (4, 256), (2, 256), (8, 256), (8, 512), (2, 512))
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of which type, with which window (0 for none), and whether causal.
_VARIANTS = (("bf16", 0, True), ("bf16", 512, True), ("bf16", 512, False), ("fp16", 0, True))
# What else the kernels read and write; all other arguments are numbers.
_TYPES = {
    "parts": "*fp32",
    "states": "*fp32",
    "spans": "*i32",
    "tables": "*i32",
    "scaling": "fp32",
    "seeds": "*i64",
    "positions": "*i64",
    "temperatures": "*fp32",
    "top_k": "*i64",
    "top_p": "*fp32",
    "log_min_p": "*fp32",
    "token_ids": "*i64",
    "maxima": "*fp32",
    "masses": "*fp32",
    "listed": "*i32",
    "found": "*fp32",
    "bounds": "*fp32",
    "chosen": "*i64",
    "winner_scores": "*fp32",
    "winners": "*i32",
    "eps": "fp32",
    "gain": "*fp32",
    "query_gain": "*fp32",
    "key_gain": "*fp32",
    "slots": "*i64",
}
# Sizes of rows that norms read; of heads, also those that are rotated and written.
_DIMS = (80, 256, 512, 5376)
_HEAD_DIMS = _DIMS[:3]


def main() -> None:
    for name in sys.argv[1:]:
        if name.isdigit():
            target = GPUTarget("cuda", int(name), 32)
            parts = [compiled(target), compiled_layers(target), compiled_sampling(target)]
        else:
            parts = [compiled(GPUTarget("hip", name, 64))]
        for kernel, found in itertools.chain(*parts):
            print(json.dumps({"name": kernel, **found}))


def compiled(target: GPUTarget) -> Iterator[tuple[str, dict[str, int]]]:
    """All variants that a GPU of this compute capability would run."""
    variants = _VARIANTS if target.backend == "cuda" else _VARIANTS[:1]
    for (num_groups, head_dim), (kind, window, causal) in itertools.product(_SHAPES, variants):
        dtype = _DTYPES[kind]
        tiles = Tiles.of(num_groups, head_dim, dtype)
        constants = {
            "NUM_PARTS": attention._NUM_PARTS,
            "HEAD_DIM": head_dim,
            "NUM_ELEMENTS": tiles.num_elements,
            "SPLIT": attention._SPLIT,
            "WINDOW": window,
            "CAUSAL": causal,
        }
        name = f"{num_groups} groups, {head_dim}, {kind}, window {window}, causal {causal}"
        pointers = {"query": kind, "keys": kind, "values": kind, "output": kind}
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        if target.backend == "cuda":
            options["maxnreg"] = attention._MAX_REGISTERS
        tile = {
            "BLOCK_SIZE": 16,
            "NUM_GROUPS": num_groups,
            "NUM_KV_HEADS": 2,
            "TILE_TOKENS": tiles.num_tokens,
            "TILE_ROWS": tiles.num_rows,
            "TILE_KEYS": tiles.num_keys,
            "IS_FLOAT32": False,
        }
        yield f"attend {name}", _compile(attend_parts, target, pointers, constants | tile, options)
        if not window and causal:
            yield f"join {name}", _compile(join_parts, target, pointers, constants, {})


def compiled_layers(target: GPUTarget) -> Iterator[tuple[str, dict[str, int]]]:
    """What layers do beside attention, in bfloat16."""
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (gate, {"SIZE": 6144, "TILE": 1024, "IS_GELU": is_gelu}, 4) for is_gelu in (False, True)
    ]
    for dim in _DIMS:
        size = {"NUM_ELEMENTS": triton.next_power_of_2(dim)}
        num_warps = min(8, max(1, size["NUM_ELEMENTS"] // 512))
        norm = {"DIM": dim, "ROUNDS": False} | size
        cases += [(rms_norm, norm, num_warps), (rms_norm, norm | {"ROUNDS": True}, num_warps)]
        if dim in _HEAD_DIMS:
            _, tile_heads = attention.tile_of_heads(dim, 8)
            head = {"HEAD_DIM": dim, "TILE_HEADS": tile_heads} | size
            cases.append((rms_norm, norm | {"gain": None, "residual": None}, num_warps))
            normed = head | {"IS_NORMED": True, "ROUNDS": False}
            bare = head | {"IS_NORMED": False, "ROUNDS": False, "query_gain": None}
            alone = {"key": None, "key_output": None, "key_gain": None}
            cases += [(rotate, each, 4) for each in (normed, normed | alone)]
            cases += [(rotate, bare | {"key_gain": None}, 4), (write_kv, head, 4)]
    names = (
        "rows",
        "output",
        "query",
        "key",
        "cos",
        "sin",
        "query_output",
        "key_output",
        "factors",
    )
    kinds = dict.fromkeys((*names, "value", "keys", "values", "residual"), "bf16")
    for kernel, constants, num_warps in cases:
        found = _compile(kernel, target, kinds, constants, {"num_warps": num_warps})
        yield f"{kernel.__name__} {constants}", found
    tile = {
        "TILE_ROWS": products.TILE_ROWS,
        "TILE_OUTPUTS": products.TILE_OUTPUTS,
        "TILE_ELEMENTS": products.TILE_ELEMENTS,
        "IS_FLOAT32": False,
    }
    pointers = dict.fromkeys(("rows", "weight", "bias", "output"), "bf16")
    for size, more in itertools.product((2560, 5376), ({}, {"bias": None})):
        constants = {"SIZE": size} | tile | more
        found = _compile(multiply, target, pointers, constants, products.OPTIONS)
        yield f"multiply {constants}", found


def compiled_sampling(target: GPUTarget) -> Iterator[tuple[str, dict[str, int]]]:
    """The kernels of sampling: 262,144 tokens, and as many candidates whose tokens are given."""
    chunk = {"CHUNK_BLOCKS": sampling._CHUNK_BLOCKS}
    num_chunks = 1024 // sampling._CHUNK_BLOCKS
    no_ids = {"token_ids": None}
    cases: tuple[tuple[Any, dict[str, Any]], ...] = (
        (sampling_kernels.find_maxima, chunk),
        (sampling_kernels.find_bounds, {"NUM_BLOCKS": 1024, "TILE": sampling._TILE} | no_ids),
        (sampling_kernels.find_winners, chunk | no_ids),
        (sampling_kernels.find_winners, chunk),
        (sampling_kernels.join_winners, {"NUM_CHUNKS": num_chunks}),
    )
    for kernel, constants in cases:
        found = _compile(kernel, target, {"logits": "bf16"}, constants, sampling._OPTIONS)
        yield kernel.__name__, found


def _compile(
    kernel: Any,
    target: GPUTarget,
    pointers: dict[str, str],
    constants: dict[str, Any],
    options: Any,
) -> dict[str, int]:
    types = _TYPES | {name: f"*{kind}" for name, kind in pointers.items()}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [(i,) for i, name in enumerate(signature) if signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    found = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        said = found.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"\.{name}:\s*(\d+)", said)[-1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return {"registers": registers, "stack": stack, "shared": found.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage is not None, said
    registers, stack = map(int, usage.groups())
    return {"registers": registers, "stack": stack, "shared": found.metadata.shared}


if __name__ == "__main__":
    main()
