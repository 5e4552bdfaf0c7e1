"""What computes on a GPU: kernels in the Triton language, graphs, and torch's own operations."""

from __future__ import annotations

import gc
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache, WriteKV
from tandem.cuda.round_tools import RoundTools
from tandem.errors import UnsupportedModelError
from tandem.joined_linear import join, joinable

if TYPE_CHECKING:
    from tandem.cuda.attention import PagedAttention

T = TypeVar("T")

# The Triton language comes with torch for CUDA.
_HAS_KERNELS = find_spec("triton") is not None


class CUDAWing:
    """A GPU's side of what `tandem.wing` promises.

    Attributes:
        occupies_host: the host's threads run beside a step.
        fills_memory: what everything else leaves is for the KV cache.
        linear: layers whose products `use_own_products` replaces.
    """

    occupies_host = False
    fills_memory = True
    linear = nn.Linear

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def default_dtype(self) -> torch.dtype:
        """What GPUs multiply fastest without losing the model."""
        return torch.bfloat16

    def describe(self) -> list[object]:
        """What measured costs depend on."""
        return [torch.cuda.get_device_name(self._device)]

    def synchronize(self) -> None:
        """Waits for what runs on the device."""
        torch.cuda.synchronize(self._device)

    # --- models

    def set_up(self) -> None:
        """Prepares the process, before it loads a model."""

    def joinable(self, model: nn.Module) -> AbstractContextManager[list[list[nn.Linear]]]:
        """Sees in a pass which linear layers read the same rows."""
        return joinable(model)

    def prepare(self, model: PreTrainedModel, groups: Items[Items[nn.Linear]]) -> None:
        """Lays a loaded model out for the device; it computes what it did.

        Args:
            groups: what `joinable` saw.
        """
        _fuse(model)
        join(model, groups)

    def prepare_drafter(self, drafter: PreTrainedModel, keep: nn.Module | None = None) -> None:
        """Lays a drafter out for the device."""
        _fuse(drafter)

    def likeliest_token(self, head: nn.Module) -> None:
        """There is no way to the likeliest token but by all logits."""

    def compiled(self, make: Callable[..., T], model: PreTrainedModel, cache: KVCache) -> T | None:
        """There are no graphs of passes."""
        return None

    # --- batch_invariant

    def check_attention(self, dtype: torch.dtype) -> None:
        """Whether attention is that of kernels, whose splits go by positions.

        Raises:
            UnsupportedModelError: it isn't.
        """
        if self.round_tools(dtype) is None:
            raise UnsupportedModelError(
                "batch_invariant: Tandem's kernels are needed: install triton"
            )

    def use_own_products(self, model: nn.Module) -> None:
        """Makes a row's products independent of what other rows there are.

        Raises:
            UnsupportedModelError: it can't be done.
        """
        from tandem.cuda.products import use_own_products

        use_own_products(model)

    def own_costs(self, model: nn.Module, rounds: int) -> dict[int, float]:
        """What they take longer than the library's, as a share, by the number of rows.

        Args:
            rounds: of each, in turns; the quickest counts.
        """
        from tandem.cuda.products import costs

        return costs(model, rounds, self.synchronize)

    def use_library_products(self, model: nn.Module) -> None:
        """Takes `use_own_products` back."""
        from tandem.cuda.products import use_library

        use_library(model)

    # --- operations

    def attention_kernel(self, dtype: torch.dtype) -> PagedAttention | None:
        """Attention over the block pool in place; None where the Triton language isn't there."""
        if not _HAS_KERNELS:
            return None
        from tandem.cuda.attention import paged_attention

        return paged_attention(dtype)

    def write_kv(self) -> WriteKV | None:
        """Writes K and V in one launch; None where the Triton language isn't there."""
        if not _HAS_KERNELS:
            return None
        from tandem.cuda.attention import write_to_pool

        return write_to_pool

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of `[1, num_kv_heads, num_rows, head_dim]` by matrix products."""
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def exp_sums(
        self, logits: Tensor, rows: Tensor, temperature: Tensor, highest: Tensor
    ) -> Tensor:
        """The sum of `exp(logits[row] / temperature - highest)` for each of `rows`, float32."""
        return (logits[rows].float() / temperature - highest).exp().sum(dim=-1, keepdim=True)

    def round_tools(self, dtype: torch.dtype) -> RoundTools | None:
        """What whole rounds on the device are made with; None where they can't run."""
        kernel = self.attention_kernel(dtype)
        if kernel is None:
            return None
        from tandem.cuda.sampling import choose

        return RoundTools(kernel, choose, self._device)

    # --- memory

    def free_bytes(self) -> int:
        """The GPU's memory that nobody uses."""
        return torch.cuda.mem_get_info(self._device)[0]

    def release(self) -> None:
        """Gives back what was only kept for what might come."""
        gc.collect()
        torch.cuda.empty_cache()

    def cache_bytes(self, wanted: int, utilization: float, held: int) -> int:
        """Bytes for the KV cache: what everything else leaves, once all of it has run.

        What is reserved by then is weights, graphs, and the peak of what ran without one. Outside
        of it lie the driver's own, graphs' too, and other processes.

        Args:
            wanted: of use where the memory is not all for this process.
            utilization: the share of the GPU's memory that may be filled.
            held: by the cache that there is.
        """
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        outside = total - free - reserved
        return max(0, int(total * utilization) - outside - (reserved - held))


def _fuse(model: nn.Module) -> None:
    """Lets one launch compute what torch takes several for, where both agree."""
    if _HAS_KERNELS:
        from tandem.cuda.mlp import fuse_mlps
        from tandem.cuda.norms import fuse_norms
        from tandem.cuda.rotary import fuse_rotary

        fuse_norms(model)
        fuse_rotary(model)
        fuse_mlps(model)
