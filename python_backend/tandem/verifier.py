"""The packed forward: one pass of the verifier over all tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.attention import PackedBatch, Span
from tandem.kv_cache import KVCache
from tandem.sequence import ScheduledSequence


@dataclass(frozen=True)
class VerifierOutput:
    """One row for each token that can be sampled, in the order of the batch.

    A sequence whose pass reaches the end of its known tokens has `1 + len(draft_ids)` rows; any
    other has none.
    """

    logits: Tensor  # [num_rows, vocab_size]
    hidden: Tensor  # [num_rows, hidden_size], what the output head reads: after the last norm


class Verifier:
    """A transformers causal LM on the paged cache; its code and weights are unmodified."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._hidden: Tensor | None = None
        head: torch.nn.Module = model.get_output_embeddings()
        head.register_forward_pre_hook(self._keep_hidden)

    def _keep_hidden(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden = args[0]

    def forward(self, batch: Items[ScheduledSequence]) -> VerifierOutput:
        """Runs the model over the batch's known tokens and drafts, and writes their K/V."""
        device = self.model.device
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans = []
        for scheduled in batch:
            sequence = scheduled.sequence
            start = sequence.num_computed
            known = sequence.token_ids[start : start + scheduled.num_tokens]
            token_ids += known + scheduled.draft_ids
            stop = start + len(known) + len(scheduled.draft_ids)
            positions += range(start, stop)
            if scheduled.yields_token:
                rows += range(len(token_ids) - len(scheduled.draft_ids) - 1, len(token_ids))
            spans.append(Span(stop - start, stop, sequence.block_table))
        packed = PackedBatch(spans, self.cache.block_size, self.model.dtype, device)
        logits = self.model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            cache=self.cache.writer(packed.slots()),
            use_cache=True,
            logits_to_keep=torch.tensor(rows, dtype=torch.long, device=device),
            packed=packed,
        ).logits
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        return VerifierOutput(logits[0], hidden[0])
