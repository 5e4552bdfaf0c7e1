"""What an assistant reads of the verifier, for whole texts at once, and kept in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from tandem.drafters.assistant import SharedKV
from tandem_train.corpus import TrainingText

DENSE_ATTENTION = "tandem_dense"


@dataclass(frozen=True)
class Visible:
    """Which keys a row of queries may read: query i stands at position `start + i`.

    The verifier's queries see themselves (`causal`). An assistant's don't: the last known token has
    no K/V yet. Its window is as wide as serving's, see `tandem.models.attention`.
    """

    start: int
    causal: bool

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: Any) -> Tensor:
        """`[num_queries, num_keys]`, True where a key is visible."""
        queries = torch.arange(self.start, self.start + num_queries, device=device).unsqueeze(1)
        keys = torch.arange(num_keys, device=device)
        visible = keys < queries + self.causal
        if window is not None:
            visible &= keys >= queries - window + (1 if self.causal else -1)
        return visible


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visible: Visible,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over texts of equal length, `[batch, heads, length, head_dim]`."""
    mask = visible.mask(query.shape[2], key.shape[2], sliding_window, query.device)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2), None


AttentionInterface.register(DENSE_ATTENTION, dense_attention)


class Recorder(SharedKV):
    """Keeps the K/V of some layers as the verifier computes them."""

    def __init__(self, source_layers: Items[int]) -> None:
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}
        self._source_layers = frozenset(source_layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Passes the layer's own K/V on."""
        if layer_idx in self._source_layers:
            self.recorded[layer_idx] = (key_states, value_states)
        return key_states, value_states


@dataclass(frozen=True)
class Features:
    """A batch of texts, padded on the right, and what the verifier makes of them."""

    token_ids: Tensor  # [batch, length]
    lengths: Tensor  # [batch]
    hidden: Tensor  # [batch, length, hidden_size], after the last norm
    # K and V for each layer of the assistant, `[batch, num_kv_heads, length, head_dim]`.
    sources: list[tuple[Tensor, Tensor]]


class FeatureStore:
    """The features of texts, computed when a text is first asked for.

    Texts are padded to `length` and features stored as `dtype`, in main memory.
    """

    def __init__(
        self,
        verifier: PreTrainedModel,
        source_layers: Items[int],
        length: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._verifier = verifier
        self._source_layers = source_layers
        self._length = length
        self._dtype = dtype
        self._stored: dict[int, list[Tensor]] = {}

    def batch(self, texts: Items[TrainingText]) -> Features:
        """The texts' features, in float32."""
        missing = [text for text in texts if text.index not in self._stored]
        if missing:
            self._compute(missing)
        device = self._verifier.device
        columns = zip(*(self._stored[text.index] for text in texts), strict=True)
        hidden, *kv = (torch.stack(column).to(device, torch.float32) for column in columns)
        return Features(
            self._padded(texts),
            torch.tensor([len(text.token_ids) for text in texts], device=device),
            hidden,
            list(zip(kv[::2], kv[1::2], strict=True)),
        )

    def token_batches(self, texts: Items[TrainingText], size: int = 8) -> Iterator[Tensor]:
        """Token ids of texts of equal length, `[batch, length]`, unpadded."""
        by_length: dict[int, list[TrainingText]] = defaultdict(list)
        for text in texts:
            by_length[len(text.token_ids)].append(text)
        for length, group in by_length.items():
            for start in range(0, len(group), size):
                yield self._padded(group[start : start + size])[:, :length]

    def _padded(self, texts: Items[TrainingText]) -> Tensor:
        token_ids = torch.zeros(len(texts), self._length, dtype=torch.long)
        for row, text in zip(token_ids, texts, strict=True):
            row[: len(text.token_ids)] = torch.tensor(text.token_ids)
        return token_ids.to(self._verifier.device)

    @torch.inference_mode()
    def _compute(self, texts: Items[TrainingText]) -> None:
        recorder = Recorder(self._source_layers)
        hidden = verifier_states(self._verifier, self._padded(texts), recorder)
        for row, text in enumerate(texts):
            kv = (part[row] for index in self._source_layers for part in recorder.recorded[index])
            self._stored[text.index] = [part.to(self._dtype).cpu() for part in (hidden[row], *kv)]


def verifier_states(verifier: PreTrainedModel, token_ids: Tensor, cache: SharedKV) -> Tensor:
    """The verifier's states after its last norm, `[batch, length, hidden_size]`, without logits."""
    base: Any = verifier.base_model
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).unsqueeze(0)
    states: Tensor = base(
        input_ids=token_ids,
        position_ids=positions,
        cache=cache,
        use_cache=True,
        visible=Visible(0, causal=True),
    ).last_hidden_state
    return states
