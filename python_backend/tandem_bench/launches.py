"""What would be launched on a GPU, noted where there is none."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tandem import cuda

# What reads a value back, or has a shape that depends on data: neither can be in a CUDA graph.
_FORBIDDEN = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "item", "is_nonzero"}
)
# No work on a device.
_FREE = frozenset(
    {"empty", "new_empty", "empty_like", "detach", "detach_", "lift_fresh", "view", "_unsafe_view"}
)
# None where they give what they got.
_COPIES = frozenset({"contiguous", "flatten", "reshape", "to", "type_as"})
Shapes = tuple[tuple[int, ...], ...]


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operation of torch that does work on a device.

    Attributes:
        launches: names, and the shapes of what goes in and comes out.
        refused: what a CUDA graph can't hold.
        outside: storages that were there before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[tuple[str, Shapes]] = []
        self.refused: list[str] = []
        self.outside: set[int] = set()
        self._made: dict[int, Tensor] = {}  # kept, so that no address is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and notes it."""
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(map(_is_mask, args[1]))
        if name in _FORBIDDEN or masks:
            self.refused.append(name)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.outside |= {place for place in map(storage_of, inputs) if place not in self._made}
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            if (place := storage_of(tensor)) not in self.outside:
                self._made[place] = tensor
        is_free = func.is_view or name in _FREE
        if name in _COPIES:
            is_free = storage_of(result) == storage_of(inputs[0])
        if not is_free:
            self.note(name, *inputs, *outputs)
            self.count_operation(func, args, inputs, outputs)
        return result

    def note(self, name: str, *tensors: Tensor) -> None:
        """Adds a launch."""
        self.launches.append((name, tuple(tuple(tensor.shape) for tensor in tensors)))

    def count_operation(
        self, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Where a subclass counts what an operation of torch does."""

    def count_kernel(self, name: str, arguments: dict[str, Any]) -> None:
        """Where a subclass counts what a kernel in the Triton language does."""

    @property
    def counts(self) -> Counter[str]:
        """How often each name was launched."""
        return Counter(name for name, _ in self.launches)


def storage_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor from others', on `meta` too."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@contextmanager
def noted_kernels(launches: Launches) -> Iterator[None]:
    """Kernels in the Triton language are noted meanwhile and not run; they write nothing."""
    from triton import KernelInterface

    names = [module.name for module in pkgutil.iter_modules(cuda.__path__)]
    modules = [importlib.import_module(f"{cuda.__name__}.{name}") for name in names]
    with ExitStack() as stack:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, KernelInterface):
                    noted = _NotedKernel(name, kernel, launches)
                    stack.enter_context(patch.object(module, name, noted))
        yield


class _NotedKernel:
    def __init__(self, name: str, kernel: Any, launches: Launches) -> None:
        self._name = name
        self._arg_names: list[str] = kernel.arg_names
        self._launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **options: Any) -> None:
        arguments = dict(zip(self._arg_names, args, strict=False)) | options
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        self._launches.note(self._name, *tensors)
        self._launches.count_kernel(self._name, arguments)
