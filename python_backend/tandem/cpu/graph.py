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
import time
import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.cache_files import find_file, keep_file
from tandem.cpu.kernels import Operators
from tandem.cpu.kernels.operators import direct_calls, once
from tandem.errors import UnsupportedModelError
from tandem.machine import code_hash, cpu_name

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
# The compiler writes the values of constants of this size into the code.
_MAX_INLINED = 64


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
        name = _file_name(module)
        path = find_file(name) or keep_file(name, partial(_compile, module, inputs))
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors.update(module.named_buffers(remove_duplicate=False))
        try:
            self._loaded = operators.load_graph(path, tensors)
        except KeyError as error:
            raise UnsupportedModelError(f"it makes tensors of its own: {error}") from error
        except RuntimeError:
            # Of another system; the next engine makes it anew.
            path.unlink(missing_ok=True)
            raise

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The tensors that the module returns."""
        return self._loaded(inputs)


def _file_name(module: nn.Module) -> str:
    """What the compiled module is kept as: all that the graph depends on is in it."""
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
    return f"graph-{key[:16]}.pt2"


def _compile(module: nn.Module, inputs: Items[Tensor], path: Path) -> None:
    logger.info("compiling %s, which is done once on a machine", type(module).__name__)
    started = time.monotonic()
    varying = tuple({int(x.shape[0] == 1): torch.export.Dim.DYNAMIC} for x in inputs)
    with _angles_once(module), _no_warnings():
        program = torch.export.export(
            module, tuple(inputs), dynamic_shapes=(varying,), strict=False
        )
    with _utf8_files(), _no_warnings():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                **_SETTINGS,
                "aot_inductor.custom_ops_to_c_shims": direct_calls(),
            },
        )
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
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _utf8_files() -> Iterator[None]:
    """The compiler reads its own files as the locale says, which is ASCII where none is set."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
