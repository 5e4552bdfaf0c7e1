"""Multi-token prediction with an assistant, which reads the verifier's own K/V.

The assistant's layers attend to the pool of one of the verifier's layers each, so it owns no cache
and has nothing to roll back. Within a round the position stays that of the last known token, and
the state it feeds back is its own.

Source: the Gemma 4 assistants in transformers (`gemma4_assistant`), by whose modules theirs run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.drafters.assistant import Assistant, SharedKV, check_fingerprint
from tandem.drafters.compiled_step import compile_step
from tandem.drafters.drafter import Drafter, DraftRequest, GoesOn, always
from tandem.errors import DrafterMismatchError
from tandem.models.attention import ATTENTION, Packed, PackedBatch, Span
from tandem.requests.sequence import Draft, Sequence
from tandem.sampling.sample import Draw, Guess, guess

# Samples a token in each row of logits, whose candidates are these tokens: all, if None.
DrawGuess = Callable[[Tensor, Tensor | None], Guess]


def _draw(draws: Items[Draw], logits: Tensor, token_ids: Tensor | None) -> Guess:
    return guess(logits, draws, token_ids)


def source_layers(verifier: PreTrainedModel, cache: KVCache) -> dict[str, int]:
    """The verifier's last layer of each type that stores K/V of its own."""
    layer_types = verifier.config.get_text_config().layer_types
    return {kind: index for index, kind in enumerate(layer_types) if cache.has_layer(index)}


class MTPDrafter(Drafter):
    """Drafts by repeated passes of an assistant, all sequences in one packed row."""

    def __init__(self, assistant: PreTrainedModel, cache: KVCache) -> None:
        assistant.set_attn_implementation(ATTENTION)
        self._assistant: Any = assistant
        self._cache = cache
        self._hidden: dict[int, Tensor] = {}

    @abstractmethod
    def advance(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, draw: DrawGuess, packed: Packed
    ) -> tuple[Guess, Tensor]:
        """One guess for each sequence, and the state that the next goes on from.

        Args:
            tokens: the last known or guessed ones, `[num_sequences]`.
            hidden: the states that they come from, `[num_sequences, hidden_size]`.
            positions: of the last known tokens, `[1, num_sequences]`.
            draw: samples guesses under the noise that the verifier will use.
        """

    def observe(self, sequence: Sequence, hidden: Tensor) -> None:
        """Keeps the state from which the next round starts."""
        self._hidden[sequence.id] = hidden

    def forget(self, sequence: Sequence) -> None:
        """Drops the sequence's state."""
        self._hidden.pop(sequence.id, None)

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        """Guesses `num_tokens` tokens for each sequence, fewer if going on doesn't pay."""
        device = self._assistant.device
        sequences = [request.sequence for request in requests]
        tokens = torch.tensor([s.token_ids[-1] for s in sequences], device=device)
        positions = torch.tensor([[s.num_tokens - 1 for s in sequences]], device=device)
        hidden = torch.stack([self._hidden[s.id] for s in sequences])
        packed = PackedBatch(
            [Span(1, s.num_computed, s.block_tables) for s in sequences],
            self._cache.block_size,
            self._assistant.dtype,
            device,
            windows=self._cache.windows,
            causal=False,
        )
        drafts = [Draft([], []) for _ in requests]
        for step in range(max(request.num_tokens for request in requests)):
            if step > 0 and not goes_on(sequences, [draft.confidences for draft in drafts]):
                break
            draws = [Draw(s.params, s.seed, s.num_tokens + step) for s in sequences]
            draw = partial(_draw, draws)
            (tokens, sure), hidden = self.advance(tokens, hidden, positions, draw, packed)
            for draft, *each in zip(drafts, tokens.tolist(), sure.tolist(), strict=True):
                draft.token_ids.append(each[0])
                draft.confidences.append(each[1])
        return [draft.first(r.num_tokens) for draft, r in zip(drafts, requests, strict=True)]


class Gemma4Drafter(MTPDrafter):
    """Drafts with one of the published Gemma 4 assistants."""

    def __init__(
        self, assistant: PreTrainedModel, verifier: PreTrainedModel, cache: KVCache
    ) -> None:
        check_gemma4_fit(assistant, verifier, cache)
        super().__init__(assistant, cache)
        self._embed = verifier.get_input_embeddings()
        self._sources = source_layers(verifier, cache)

    @property
    def shared_kv_states(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The pool itself: the assistant's layers pass it on to the attention function."""
        return {kind: self._cache.layer(index) for kind, index in self._sources.items()}

    def advance(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, draw: DrawGuess, packed: Packed
    ) -> tuple[Guess, Tensor]:
        """See `MTPDrafter.advance`."""
        inputs = torch.cat([self._embed(tokens), hidden], dim=-1).unsqueeze(0)
        output = self._assistant.model(
            inputs_embeds=self._assistant.pre_projection(inputs),
            position_ids=positions,
            attention_mask=dict.fromkeys(self._sources),
            shared_kv_states=self.shared_kv_states,
            use_cache=False,
            # A number, such as the default, would make Gemma 4 slice the row as one sequence.
            logits_to_keep=None,
            packed=packed,
        )
        state: Tensor = output.last_hidden_state[0]
        return self._guess(state, draw), self._assistant.post_projection(state)

    def _guess(self, state: Tensor, draw: DrawGuess) -> Guess:
        head = self._assistant.masked_embedding
        if head is None:
            return draw(self._assistant.lm_head(state), None)
        # Only the tokens of the best centroids are scored.
        best = head.centroids(state).topk(head.centroid_intermediate_top_k, dim=-1).indices
        clusters = head.token_ordering.view(head.num_centroids, head.vocab_size_per_centroid)
        token_ids = clusters[best].flatten(1).long()  # [num_sequences, num_candidates]
        weight = self._assistant.lm_head.weight[token_ids]
        logits = (weight @ state.unsqueeze(-1)).squeeze(-1)
        return draw(logits, token_ids)


class TrainedDrafter(MTPDrafter):
    """Drafts with an assistant that was trained for the verifier (see `scripts/train_drafter`)."""

    def __init__(
        self,
        assistant: Assistant,
        verifier: PreTrainedModel,
        cache: KVCache,
        *,
        enforce_eager: bool = False,
    ) -> None:
        """Takes a loaded assistant.

        Args:
            cache: the verifier's.
            enforce_eager: whether not to compile it.

        Raises:
            DrafterMismatchError: it doesn't fit the verifier.
        """
        check_fingerprint(assistant, verifier)
        for index in assistant.config.source_layers:
            if not cache.has_layer(index):
                raise DrafterMismatchError(f"the verifier's layer {index} stores no K/V of its own")
        super().__init__(assistant, cache)
        self.vocabulary = frozenset(assistant.draft_token_ids.tolist())
        self.trained_length = assistant.config.trained_length
        self.compiled = None if enforce_eager else compile_step(assistant, self._shared(), cache)

    def _shared(self) -> SharedKV:
        sources = self._assistant.config.source_layers
        return SharedKV([self._cache.layer(index) for index in sources])

    def advance(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, draw: DrawGuess, packed: Packed
    ) -> tuple[Guess, Tensor]:
        """See `MTPDrafter.advance`."""
        row = tokens.unsqueeze(0), hidden.unsqueeze(0), positions
        if self.compiled is not None:
            assert isinstance(packed, PackedBatch)
            state, logits = self.compiled(*row, packed)
        else:
            state = self._assistant(*row, self._shared(), packed=packed)
            logits = self._assistant.head(state)
        token_ids = self._assistant.draft_token_ids.expand(len(tokens), -1)
        return draw(logits[0], token_ids), state[0]


def check_gemma4_fit(assistant: PreTrainedModel, verifier: PreTrainedModel, cache: KVCache) -> None:
    """Compares what the assistant expects with what the verifier has.

    Raises:
        DrafterMismatchError: naming the first thing that differs, and both values.
    """
    config, target = assistant.config.get_text_config(), verifier.config.get_text_config()

    def compare(what: str, drafter_value: object, verifier_value: object) -> None:
        if drafter_value != verifier_value:
            raise DrafterMismatchError(
                f"the drafter doesn't fit this verifier: {what} is {drafter_value} in the drafter "
                f"and {verifier_value} in the verifier"
            )

    compare("vocab_size", config.vocab_size, target.vocab_size)
    compare("backbone hidden size", assistant.config.backbone_hidden_size, target.hidden_size)
    sources = source_layers(verifier, cache) if getattr(target, "layer_types", None) else {}
    for index, kind in enumerate(config.layer_types):
        if kind not in sources:
            raise DrafterMismatchError(
                f"the drafter doesn't fit this verifier: its layer {index} is of type {kind}; "
                f"the verifier has {', '.join(sources) or 'no layer types'}"
            )
        keys, _ = cache.layer(sources[kind])
        layer = config.per_layer_config[index]
        compare(f"KV heads of {kind}", layer.num_key_value_heads, keys.shape[1])
        compare(f"head size of {kind}", layer.head_dim, keys.shape[2])
        if kind == "sliding_attention":
            compare("sliding window", config.sliding_window, target.sliding_window)
