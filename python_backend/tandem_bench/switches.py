"""The engine's mechanisms on a CPU, and how to switch each of them off in a process.

The engine has no options for that: something else is put into the place of one of its names before
it loads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from tandem import Engine
from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.kernels import FusedRMSNorm
from tandem.cpu.linear import Int8Linear, PackedLinear
from tandem.cpu.packing import head_matrix
from tandem.cpu.tied_embedding import TiedEmbedding
from tandem.drafters.mtp import MTPDrafter
from tandem.joined_linear import JoinedLinear


@dataclass(frozen=True)
class Mechanism:
    """Something that the engine does for speed or memory.

    Attributes:
        instead: what stands at each "module:name" when it is switched off.
        works: whether an engine has it; asked in the process that loaded it.
        takes_along: other mechanisms that can't work without it.
    """

    instead: Mapping[str, object]
    works: Callable[[Engine], bool]
    takes_along: tuple[str, ...] = ()


def _nothing(*_: object, **__: object) -> None:
    """No kernel, no graph, no embedding that is tied; or does nothing."""


@contextmanager
def _none_joined(_model: nn.Module) -> Iterator[list[list[nn.Linear]]]:
    yield []


def _dense(kind: type[BlockedMatrix], packed: Tensor) -> BlockedMatrix:
    """A copy in plain rows, for those that would read the packed memory in place."""
    return kind.plain(packed.to_dense())


def _keep_all_products() -> None:
    for name in _kept_products():
        os.environ.pop(name, None)


def _kept_products() -> Items[str]:
    names: Mapping[str, str] = import_module("tandem.cpu.packing")._KEPT_PRODUCTS
    return list(names)


def _has(kind: type[nn.Module]) -> Callable[[Engine], bool]:
    """Whether there is such a module in the verifier or in a drafter."""

    def found(engine: Engine) -> bool:
        models: list[nn.Module] = [engine.verifier.model]
        models += [d._assistant for d in engine.drafters.values() if isinstance(d, MTPDrafter)]
        return any(isinstance(module, kind) for model in models for module in model.modules())

    return found


def _finds(module: str, name: str) -> Callable[[Engine], bool]:
    """Whether a module gets a kernel for the verifier's device and type."""

    def found(engine: Engine) -> bool:
        model = engine.verifier.model
        return getattr(import_module(module), name)(model.device, model.dtype) is not None

    return found


def _reads_packed(engine: Engine) -> bool:
    matrix = head_matrix(engine.verifier.head)
    return matrix is not None and matrix.memory.shape[2] > 1


def _released_file(engine: Engine) -> bool:
    folder = str(Path(engine.config.verifier).resolve())
    return not any(file.path.startswith(folder) for file in psutil.Process().memory_maps())


_COMPILED_PASS: dict[str, object] = {"tandem.models.loading:compile_pass": _nothing}
_COMPILED_STEP: dict[str, object] = {"tandem.drafters.mtp:compile_step": _nothing}
MECHANISMS: dict[str, Mechanism] = {
    "likeliest in 8 bits": Mechanism(
        {"tandem.cpu.wing:likeliest_token": _nothing},
        lambda engine: engine.verifier.head._likeliest is not None,
    ),
    "exp sums": Mechanism(
        {"tandem.cpu.kernels.exp_sums:library": _nothing},
        _finds("tandem.cpu.kernels.exp_sums", "library"),
    ),
    "tied embedding": Mechanism(
        {"tandem.cpu.packing:tied_embedding": _nothing}, _has(TiedEmbedding)
    ),
    "blocked matrix": Mechanism(
        {"tandem.cpu.blocked_matrix:BlockedMatrix.packed": classmethod(_dense)},
        _reads_packed,
        takes_along=("own products",),
    ),
    "joined linears": Mechanism({"tandem.cpu.wing:joinable": _none_joined}, _has(JoinedLinear)),
    "int8 drafter weights": Mechanism({"tandem.cpu.packing:_INT8_SIZE": 2**62}, _has(Int8Linear)),
    "few kept products": Mechanism(
        {"tandem.cpu.wing:keep_few_products": _keep_all_products},
        lambda _: all(name in os.environ for name in _kept_products()),
    ),
    "released file": Mechanism(
        {"tandem.cpu.packing:release_file": _nothing},
        _released_file,
    ),
    "fused norms": Mechanism(
        {"tandem.cpu.wing:fuse_norms": _nothing},
        _has(FusedRMSNorm),
    ),
    "compiled pass": Mechanism(_COMPILED_PASS, lambda engine: engine.verifier.compiled is not None),
    "compiled drafter step": Mechanism(
        _COMPILED_STEP,
        lambda engine: any(
            getattr(drafter, "compiled", None) is not None for drafter in engine.drafters.values()
        ),
    ),
    "own products": Mechanism(
        {"tandem.models.loading:make_invariant": _nothing},
        lambda engine: any(
            isinstance(module, PackedLinear) and module.memory is not None
            for module in engine.verifier.model.modules()
        ),
    ),
    # Graphs call the kernel, so without it there are none.
    "attention kernel": Mechanism(
        {"tandem.cpu.wing:attention_kernel": _nothing, **_COMPILED_PASS, **_COMPILED_STEP},
        _finds("tandem.cpu.wing", "attention_kernel"),
        takes_along=("compiled pass", "compiled drafter step", "own products"),
    ),
}


def place(name: str) -> tuple[Any, str]:
    """What holds a "module:name", and the last part of the name, as `setattr` wants them.

    Raises:
        AttributeError: there is no such name, so that nothing would be switched off.
    """
    module, _, path = name.partition(":")
    *outer, last = path.split(".")
    holder: Any = reduce(getattr, outer, import_module(module))
    getattr(holder, last)
    return holder, last


def switch_off(names: Items[str]) -> None:
    """Switches mechanisms off for the engines that this process loads from now on."""
    for name in names:
        for where, instead in MECHANISMS[name].instead.items():
            setattr(*place(where), instead)


def at_work(engine: Engine) -> list[str]:
    """The mechanisms that an engine has."""
    return [name for name, mechanism in MECHANISMS.items() if mechanism.works(engine)]


def without(names: Items[str]) -> set[str]:
    """These mechanisms and all that can't work without them."""
    return set(names).union(*(MECHANISMS[name].takes_along for name in names))
