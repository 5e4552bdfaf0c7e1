"""The verifier's output head, which is most of a small model's work.

A greedy request needs the likeliest token alone, which takes far less than all logits. So the head
is taken out of the model's pass, and computed for those rows whose logits are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.sampling.sample import largest
from tandem.wing import LikeliestToken, wing_of


class OutputHead(nn.Module):
    """Stands in a model for its head, and keeps the states that the model gives it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._head: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._likeliest: LikeliestToken | None = None
        self._can_defer = False
        self.is_deferred = False
        self.states: Tensor | None = None
        model.set_output_embeddings(self)

    @property
    def weight(self) -> Tensor:
        """`[vocab_size, hidden_size]`."""
        weight = self._head.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, states: Tensor) -> Tensor:
        """Logits, or the states themselves if the head is deferred."""
        self.states = states
        return states if self.is_deferred else self._head(states)

    def examine(self, logits: Tensor) -> None:
        """Finds out whether the model does nothing with logits that `logits` doesn't do too.

        Args:
            logits: what it made of the states that it gave last, `[num_rows, vocab_size]`.
        """
        assert self.states is not None
        self._can_defer = torch.equal(self.logits(self.states)[0], logits)

    def index(self) -> None:
        """Prepares `likeliest`, once the weights lie where they stay."""
        has_bias = getattr(self._head, "bias", None) is not None
        if self._can_defer and not has_bias:
            self._likeliest = wing_of(self.weight.device).likeliest_token(self._head)

    def defer(self) -> None:
        """Takes the head out of the model's pass, if that can be."""
        self.is_deferred = self._can_defer

    def logits(self, states: Tensor) -> Tensor:
        """`[..., hidden_size]` to `[..., vocab_size]`, as the model makes them."""
        logits: Tensor = self._head(states)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def likeliest(self, states: Tensor) -> list[int]:
        """The token with the largest logit behind each state; -1 where there are no numbers.

        Args:
            states: `[num_rows, hidden_size]`.
        """
        if self._likeliest is None:
            return likeliest_of(self.logits(states))
        token_ids = self._likeliest(states)
        unknown = [row for row, token_id in enumerate(token_ids) if token_id < 0]
        if unknown:
            found = likeliest_of(self.logits(states[unknown]))
            for row, token_id in zip(unknown, found, strict=True):
                token_ids[row] = token_id
        return token_ids


def take_states(model: PreTrainedModel) -> Tensor:
    """What the model gave its head in the last pass, `[1, num_rows, hidden_size]`, once."""
    head = model.get_output_embeddings()
    assert isinstance(head, OutputHead)
    assert head.states is not None
    states, head.states = head.states, None
    return states


def likeliest_of(logits: Tensor) -> list[int]:
    """The token with the largest logit in each row; -1 where they aren't numbers."""
    token_ids, values = largest(logits)
    found: list[int] = token_ids.where(values.isfinite(), -1).tolist()
    return found
