"""What computes on a CPU: packed products, kernels in C, passes compiled as graphs."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.cpu.compiler import Compiler, try_to_compile
from tandem.cpu.kernels import (
    AttentionKernel,
    LikeliestToken,
    attention_kernel,
    exp_sums,
    fuse_norms,
    likeliest_token,
)
from tandem.cpu.linear import PackedLinear
from tandem.cpu.packing import (
    can_pack,
    head_matrix,
    keep_few_products,
    pack_drafter,
    pack_model,
)
from tandem.cpu.products import (
    cost_of_own_products,
    use_onednn,
    use_own_products,
)
from tandem.errors import UnsupportedModelError
from tandem.joined_linear import joinable
from tandem.machine import cpu_name

logger = logging.getLogger("tandem")

# A quarter of the memory that is free may become KV cache; the rest is for other processes.
_CACHE_SHARE = 0.25

T = TypeVar("T")


class CPUWing:
    """The CPU's side of what `tandem.wing` promises.

    Attributes:
        fills_memory: other processes need it too.
        linear: layers whose products `use_own_products` replaces.
    """

    fills_memory = False
    linear = PackedLinear

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def occupies_host(self) -> bool:
        """Whether a step leaves the host's other threads no core to run on."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return torch.get_num_threads() >= (cores or 1)

    def default_dtype(self) -> torch.dtype:
        """What the processor multiplies fastest without losing the model."""
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16
        logger.info("this CPU has no bfloat16 products: taking float32")
        return torch.float32

    def describe(self) -> list[object]:
        """What measured costs depend on."""
        return [platform.processor(), cpu_name(), torch.get_num_threads()]

    def synchronize(self) -> None:
        """Waits for what runs on the device; here everything has been computed already."""

    # --- models

    def set_up(self) -> None:
        """Prepares the process, before it loads a model."""
        keep_few_products()

    def joinable(self, model: nn.Module) -> AbstractContextManager[list[list[nn.Linear]]]:
        """Sees in a pass which linear layers read the same rows; see `joined_linear.joinable`."""
        return joinable(model)

    def prepare(self, model: PreTrainedModel, groups: Items[Items[nn.Linear]]) -> None:
        """Lays a loaded model out for the processor; it computes what it did.

        Args:
            groups: what `joinable` saw.
        """
        if can_pack(model.device, model.dtype):
            pack_model(model, groups)
        fuse_norms(model)

    def prepare_drafter(self, drafter: PreTrainedModel, keep: nn.Module | None = None) -> None:
        """Lays a drafter out, whose guesses need not be exact.

        Args:
            keep: a linear layer whose weight is read by rows.
        """
        if can_pack(drafter.device, drafter.dtype):
            pack_drafter(drafter, keep)
        fuse_norms(drafter)

    def likeliest_token(self, head: nn.Module) -> LikeliestToken | None:
        """Finds the likeliest token behind a state without all logits, where that can be."""
        matrix = head_matrix(head)
        return None if matrix is None else likeliest_token(matrix)

    def compiled(
        self, make: Callable[[Compiler], T], model: PreTrainedModel, cache: KVCache
    ) -> T | None:
        """What `make` makes of a pass as a graph, or None where the model can't be compiled."""
        return try_to_compile(make, model, cache)

    # --- batch_invariant

    def check_attention(self, dtype: torch.dtype) -> None:
        """Whether attention doesn't depend on what else is in a pass.

        Raises:
            UnsupportedModelError: it may.
        """
        if self.attention_kernel(dtype) is None:
            raise UnsupportedModelError(
                "batch_invariant: Tandem's own attention is needed: install a C++ compiler"
            )

    def use_own_products(self, model: nn.Module) -> None:
        """Makes a row's products independent of what other rows there are.

        Raises:
            UnsupportedModelError: it can't be done.
        """
        use_own_products(model)

    def own_costs(self, model: nn.Module, rounds: int) -> dict[int, float]:
        """What they take longer than oneDNN's, as a share, by the number of rows.

        Args:
            rounds: of each, in turns; the quickest counts.
        """
        return cost_of_own_products(model, rounds)

    def use_library_products(self, model: nn.Module) -> None:
        """Takes `use_own_products` back."""
        use_onednn(model)

    # --- operations

    def attention_kernel(self, dtype: torch.dtype) -> AttentionKernel | None:
        """Attention over the pool in place, or None if there is none."""
        return attention_kernel(self._device, dtype)

    def write_kv(self) -> None:
        """There is nothing better than torch's operations."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of `[1, num_kv_heads, num_rows, head_dim]` by matrix products."""
        if query.dtype != torch.bfloat16:
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        # oneDNN's bfloat16 products, which torch's own attention does not use without AMX.
        scores = torch.matmul(query, key.transpose(-2, -1)).float().mul_(scale)
        if mask is not None:
            scores += mask
        return torch.matmul(scores.softmax(-1).to(query.dtype), value)

    def exp_sums(
        self, logits: Tensor, rows: Tensor, temperature: Tensor, highest: Tensor
    ) -> Tensor:
        """The mass of a row's candidates; see `kernels.exp_sums`."""
        return exp_sums(logits, rows, temperature, highest)

    def round_tools(self, dtype: torch.dtype) -> None:
        """There is no device that could run ahead of the host."""

    # --- memory

    def free_bytes(self) -> int:
        """Memory that nobody uses."""
        return int(psutil.virtual_memory().available)

    def release(self) -> None:
        """What is free is anybody's already."""

    def cache_bytes(self, wanted: int, utilization: float, held: int) -> int:
        """Bytes for the KV cache: as many as all sequences may need, if memory has them.

        Args:
            wanted: for `max_num_seqs` sequences of `max_model_len` tokens.
            utilization, held: of use where the device's memory is all for this process.
        """
        return min(wanted, int(psutil.virtual_memory().available * _CACHE_SHARE))
