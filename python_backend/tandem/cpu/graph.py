"""A model's pass, compiled into one piece.

What the layers of transformers do beside their products is Python and many small operations, which
take half as long as the products of a small model. So a pass is exported as a graph, in which
torch's Inductor fuses what lies between the products; a graph runs without Python. Products, and
what reads and writes the pool, are operators of Tandem's own in it: weights and cache exist once.

The compiled graphs are kept in Tandem's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import locale
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.cpu.kernels import Operators, operators
from tandem.cpu.kernels.operators import attend, direct_calls, once
from tandem.cpu.packing import Int8Linear, PackedLinear
from tandem.errors import UnsupportedModelError
from tandem.machine import cache_directory, code_hash, cpu_name

logger = logging.getLogger("tandem")

_SETTINGS = {
    # The weights are those of the model.
    "aot_inductor.package_constants_in_so": False,
    # Fused operations round where the model's own do.
    "emulate_precision_casts": True,
    # As many as there are when it runs; see `operators.cpp`.
    "cpp.dynamic_threads": True,
    # No pool of processes is left behind.
    "compile_threads": 1,
}
# Results may differ from the model's own by rounding alone: by the root mean square, a share of it.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# The compiler writes the values of constants of this size into the code.
_MAX_INLINED = 64

# The sequences in the examples of passes, each of a block and a token at least.
EXAMPLE_TABLES = ((5, 0), (1, 4), (3, 2))
_NUM_EXAMPLE_BLOCKS = 6
_MIN_BLOCK_SIZE = 2

T = TypeVar("T")


def try_to_compile(
    make: Callable[[Operators], T], model: PreTrainedModel, cache: KVCache
) -> T | None:
    """What `make` makes of graphs, or None where the model can't be compiled.

    Args:
        make: gets the operators with the model's weights and the pool.
    """
    found = operators(model.device, model.dtype, cache.block_size)
    if found is None:
        return None
    if cache.num_blocks < _NUM_EXAMPLE_BLOCKS or cache.block_size < _MIN_BLOCK_SIZE:
        logger.info(
            "%s runs uncompiled: the cache has %d blocks of %d tokens, and %d of %d are needed",
            *(type(model).__name__, cache.num_blocks, cache.block_size),
            *(_NUM_EXAMPLE_BLOCKS, _MIN_BLOCK_SIZE),
        )
        return None
    for module in model.modules():
        if isinstance(module, (PackedLinear, Int8Linear)):
            module.register(found)
    for layer in cache.layers:
        found.add_pool(layer, *cache.layer(layer))
    try:
        with torch.no_grad(), _example_kv(cache):
            return make(found)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        logger.warning("%s runs uncompiled, which is slower: %s", type(model).__name__, said)
        logger.debug("why it can't be compiled", exc_info=True)
        return None


@contextmanager
def _example_kv(cache: KVCache) -> Iterator[None]:
    """Other K/V in every slot of the examples' sequences, and zeros again afterwards."""
    generator = torch.Generator().manual_seed(0)
    pools = [
        pool[: _NUM_EXAMPLE_BLOCKS * cache.block_size]
        for layer in cache.layers
        for pool in cache.layer(layer)
    ]
    try:
        for pool in pools:
            pool.normal_(generator=generator)
        yield
    finally:
        for pool in pools:
            pool.zero_()


class Graph:
    """A compiled module of any number of tensors.

    The first dimension of each varies, or of `[1, n]` the second.
    """

    def __init__(self, module: nn.Module, inputs: Items[Tensor], operators: Operators) -> None:
        """Exports the module and compiles it, unless that was done before on this machine.

        Args:
            inputs: examples; a size that may be 0 or 1 must be larger in them.
            operators: with the module's weights and the pool.

        Raises:
            UnsupportedModelError: the graph needs more than the module's parameters and buffers.
        """
        path = _path(module)
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _compile(module, inputs, path)
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors.update(module.named_buffers(remove_duplicate=False))
        try:
            self._loaded = operators.load_graph(path, tensors)
        except KeyError as error:
            raise UnsupportedModelError(f"it makes tensors of its own: {error}") from error
        except RuntimeError:
            # Damaged, or of another system; the next engine makes it anew.
            path.unlink(missing_ok=True)
            raise

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The tensors that the module returns."""
        return self._loaded(inputs)


def _path(module: nn.Module) -> Path:
    """Where the compiled module is kept: all that the graph depends on is in its name."""
    facts = [torch.__version__, transformers.__version__, code_hash(), cpu_name(), repr(_SETTINGS)]
    for name, part in module.named_modules():
        facts.append(f"{name}: {type(part).__qualname__}({part.extra_repr()})")
        if isinstance(part, PreTrainedModel):
            config = part.config.to_dict()
            config.pop("_name_or_path", None)
            facts.append(json.dumps(config, sort_keys=True, default=str))
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        facts.append(f"{name}: {value.dtype} {tuple(value.shape)}")
        if value.numel() <= _MAX_INLINED:
            facts.append(str(value.tolist()))
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache_directory() / f"graph-{key[:16]}.pt2"


def _compile(module: nn.Module, inputs: Items[Tensor], path: Path) -> None:
    logger.info("compiling %s, which is done once on a machine", type(module).__name__)
    started = time.monotonic()
    varying = tuple({int(x.shape[0] == 1): torch.export.Dim.DYNAMIC} for x in inputs)
    with _angles_once(module):
        program = torch.export.export(
            module, tuple(inputs), dynamic_shapes=(varying,), strict=False
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory, _utf8_files():
        made = Path(directory) / path.name
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(made),
            inductor_configs={
                **_SETTINGS,
                "aot_inductor.custom_ops_to_c_shims": direct_calls(),
            },
        )
        # Another engine may be at the same; the last to end leaves its own.
        made.replace(path)
    logger.info("compiled in %.1f s", time.monotonic() - started)


@contextmanager
def _angles_once(module: nn.Module) -> Iterator[None]:
    """All layers read the cosines and sines, which are dear."""

    def hook(_module: nn.Module, _inputs: object, angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(once(each) for each in angles)

    hooks = [
        part.register_forward_hook(hook)
        for part in module.modules()
        if "RotaryEmbedding" in type(part).__name__
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def _utf8_files() -> Iterator[None]:
    """The compiler reads its own files as the locale says, which is ASCII where none is set."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


class GraphBatch:
    """Stands in for a `PackedBatch` while a graph is made of a pass."""

    def __init__(self, spans: Tensor, tables: Tensor, *, causal: bool = True) -> None:
        """Takes what `PackedBatch.spans` gave, as inputs of the graph."""
        self._spans, self._tables = spans, tables
        self._causal = causal

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See `tandem.models.attention.Packed`; key is what stands for the layer in the graph."""
        return attend(query, key, self._spans, self._tables, scaling, window, causal=self._causal)


def check_compiled(result: Tensor, expected: Tensor) -> None:
    """Compares what a graph and the model itself computed.

    Raises:
        UnsupportedModelError: they are not the same.
    """
    if result.shape != expected.shape:
        raise UnsupportedModelError(
            f"compiled, it gives a {tuple(result.shape)} instead of a {tuple(expected.shape)}"
        )
    difference = (result.float() - expected.float()).square().mean().sqrt().item()
    allowed = _TOLERANCE[result.dtype] * expected.float().square().mean().sqrt().item()
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"compiled, it computes something else: results differ by {difference:.3g}, and "
            f"rounding explains {allowed:.3g}"
        )
