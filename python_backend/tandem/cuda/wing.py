"""What computes on a GPU: kernels in the Triton language, graphs, and torch's own operations."""

from __future__ import annotations

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
    """

    occupies_host = False

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
        """There is no attention that doesn't depend on what else is in a pass.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "batch_invariant: torch's operations on a GPU depend on what else is in the batch"
        )

    def use_own_products(self, model: nn.Module) -> dict[int, float]:
        """Never called: `check_attention` refuses."""
        return {}

    def use_library_products(self, model: nn.Module) -> None:
        """Products are those of torch."""

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

    @torch.inference_mode()
    def cache_bytes(
        self, wanted: int, utilization: float, largest_pass: Callable[[], object]
    ) -> int:
        """Bytes for the KV cache: what the weights and the largest pass leave.

        Graphs have memory of their own: as much as the largest pass, at most.

        Args:
            wanted: of use where the memory is not all for this process.
            utilization: the share of the GPU's memory that this process may fill.
            largest_pass: runs it.
        """
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        largest_pass()
        free, total = torch.cuda.mem_get_info(self._device)
        outside = total - free - torch.cuda.memory_reserved(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.empty_cache()
        return max(0, int(total * utilization) - outside - peak - (peak - before))


def _fuse(model: nn.Module) -> None:
    """Lets one launch compute what torch takes several for, where both agree."""
    if _HAS_KERNELS:
        from tandem.cuda.mlp import fuse_mlps
        from tandem.cuda.norms import fuse_norms
        from tandem.cuda.rotary import fuse_rotary

        fuse_norms(model)
        fuse_rotary(model)
        fuse_mlps(model)
