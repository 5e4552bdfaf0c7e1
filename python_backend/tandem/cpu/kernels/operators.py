"""The operators of a compiled pass; see `operators.cpp`."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tandem.cpu.kernels.build import operator_library

logger = logging.getLogger("tandem")


class Operators:
    """The weights and the pool of one model, as its compiled graphs name them."""

    def __init__(self, block_size: int) -> None:
        self._model: int = torch.ops.tandem.make_model(block_size)
        weakref.finalize(self, torch.ops.tandem.drop_model, self._model)

    def add_linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        int8_rows: int = 0,
        int8_weight: Tensor | None = None,
        int8_scale: Tensor | None = None,
    ) -> int:
        """Takes a layer's weights.

        Args:
            memory: where the weights lie, for products that don't depend on their rows.
            int8_rows: the product of up to so many rows reads the weights in 8 bits.

        Returns:
            Its number, for `linear`.
        """
        index: int = torch.ops.tandem.add_linear(
            self._model, weight, bias, memory, int8_rows, int8_weight, int8_scale
        )
        return index

    def add_pool(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Takes a layer's pool, each `[num_slots, num_kv_heads, head_dim]`."""
        torch.ops.tandem.add_pool(self._model, layer, keys, values)

    def load_graph(self, path: Path, tensors: Mapping[str, Tensor]) -> LoadedGraph:
        """Loads a compiled graph of this model.

        Args:
            tensors: what its constants may be, by name; they must stay as they are.

        Raises:
            KeyError: it needs another one, which is named.
        """
        return LoadedGraph(self._model, path, tensors, self)


class LoadedGraph:
    """A compiled graph and the tensors that it uses."""

    def __init__(
        self, model: int, path: Path, tensors: Mapping[str, Tensor], operators: Operators
    ) -> None:
        self._model = model
        self._graph: int = torch.ops.tandem.load_graph(str(path))
        weakref.finalize(self, torch.ops.tandem.drop_graph, self._graph)
        names = torch.ops.tandem.graph_constants(self._graph)
        self._tensors = {name: tensors[name] for name in names}
        torch.ops.tandem.set_constants(self._graph, self._tensors)
        self._run = torch.ops.tandem.run_graph.default
        self._operators = operators  # lives as long

    def __call__(self, inputs: Items[Tensor]) -> list[Tensor]:
        """Runs it on one thread at a time; Python's other threads go on meanwhile."""
        outputs: list[Tensor] = self._run(self._model, self._graph, list(inputs))
        return outputs


def operators(device: torch.device, block_size: int) -> Operators | None:
    """For a new model, or None if there are none for its device."""
    return Operators(block_size) if device.type == "cpu" and load_operators() else None


@cache
def load_operators() -> bool:
    """Makes `torch.ops.tandem`; whether that could be."""
    path = operator_library()
    if path is None:
        return False
    try:
        # Graphs find their operators in it.
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        logger.warning("can't load %s, running on torch's operations, which is slower", error)
        path.unlink(missing_ok=True)
        return False
    _register_shapes()
    return True


@cache
def _register_shapes() -> None:
    shapes: dict[str, Callable[..., Tensor]] = {
        "linear": _linear_shape,
        "once": torch.empty_like,
        "write_kv": _write_kv_shape,
        "attend": _attend_shape,
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"tandem::{name}", shape)


def _linear_shape(rows: Tensor, index: int, out_features: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], out_features)


def _write_kv_shape(keys: Tensor, values: Tensor, slots: Tensor, layer: int) -> Tensor:
    return torch.empty((), dtype=torch.long)


def _attend_shape(
    query: Tensor,
    layer: Tensor,
    spans: Tensor,
    tables: Tensor,
    scaling: float,
    window: int,
    causal: bool,
) -> Tensor:
    _, num_heads, num_tokens, head_dim = query.shape
    return query.new_empty(1, num_tokens, num_heads, head_dim)


def direct_calls() -> dict[object, list[str]]:
    """The operators that a graph may call without torch's dispatcher, as Inductor's setting."""
    start, result = "AOTITorchError aoti_torch_cpu_", "AtenTensorHandle *result)"
    handles = "AtenTensorHandle {}, ".format
    return {
        torch.ops.tandem.linear.default: [
            f"{start}linear({handles('rows')}int64_t index, int64_t out_features, {result}"
        ],
        torch.ops.tandem.once.default: [f"{start}once({handles('computed')}{result}"],
        torch.ops.tandem.write_kv.default: [
            f"{start}write_kv({handles('keys')}{handles('values')}{handles('slots')}"
            f"int64_t layer, {result}"
        ],
        torch.ops.tandem.attend.default: [
            f"{start}attend({handles('query')}{handles('layer')}{handles('spans')}"
            f"{handles('tables')}double scaling, int64_t window, int32_t causal, {result}"
        ],
    }


def linear(rows: Tensor, index: int, out_features: int) -> Tensor:
    """`[..., in_features]` to `[..., out_features]`, by the model's weight of that number."""
    product: Tensor = torch.ops.tandem.linear(rows, index, out_features)
    return product


def once(computed: Tensor) -> Tensor:
    """A copy, so that the compiler doesn't compute it again wherever it is read."""
    copy: Tensor = torch.ops.tandem.once(computed)
    return copy


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, layer: int) -> Tensor:
    """Stores `[1, num_kv_heads, num_tokens, head_dim]` K and V; returns the layer, for `attend`."""
    written: Tensor = torch.ops.tandem.write_kv(keys, values, slots, layer)
    return written


def attend(
    query: Tensor,
    layer: Tensor,
    spans: Tensor,
    tables: Tensor,
    scaling: float,
    window: int | None,
    *,
    causal: bool,
) -> Tensor:
    """Attention of `[1, num_heads, num_tokens, head_dim]`.

    Args:
        layer: from `write_kv`, so that it reads what was written.
        spans, tables: see `PackedBatch.spans`.
        window, causal: see `PackedBatch`.

    Returns:
        `[1, num_tokens, num_heads, head_dim]`.
    """
    attended: Tensor = torch.ops.tandem.attend(
        query, layer, spans, tables, scaling, window or 0, causal
    )
    return attended


def multiply(rows: Tensor, memory: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`[..., in_features]` to `[..., out_features]`, each row as if it were alone.

    Args:
        memory: the weights', see `BlockedMatrix`.
    """
    product: Tensor = torch.ops.tandem.multiply(rows, memory, bias, out_features)
    return product
