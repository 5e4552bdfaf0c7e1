"""What requests change in logits, on the device: bias, penalties, and ends that come too early.

The same as `tandem.sampling.processors`, of tensors whose shapes depend on no data. A row's own
tokens, drafts before it included, are in the history when it is sampled: the pass put them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from tandem.requests.sequence import Sequence
from tandem.sampling.processors import is_adjusted

# Of a request; one that changes more tokens is sampled by the host.
MAX_BIASED, MAX_BANNED = 300, 32
# Columns of what is sent for a round that has such requests.
FLOATS = ("repetition", "presence", "frequency")
INTEGERS = ("num_prompt", "min_tokens")


def is_adjusted_here(sequence: Sequence, eos_token_ids: frozenset[int]) -> bool:
    """Whether a request changes logits, in no way that the host has to see to."""
    params = sequence.params
    by_host = sequence.grammar is not None or sequence.bad_words or params.allowed_token_ids
    if by_host or not is_adjusted(sequence):
        return False
    return (
        len(params.logit_bias) <= MAX_BIASED
        and len(banned_of(sequence, eos_token_ids)) <= MAX_BANNED
    )


def banned_of(sequence: Sequence, eos_token_ids: frozenset[int]) -> list[int]:
    """Tokens that may not come before there are `min_tokens`."""
    params = sequence.params
    return sorted({*eos_token_ids, *params.stop_token_ids}) if params.min_tokens else []


def adjust(logits: Tensor, positions: Tensor, history: Tensor, own: Mapping[str, Tensor]) -> None:
    """Changes logits in place.

    Args:
        logits: `[num_rows, vocab_size]`.
        positions: of the tokens to be sampled in their sequences, `[num_rows]`.
        history: tokens of each row's sequence, `[num_rows, max_model_len]`; those before its
            position count.
        own: how each row is adjusted: `FLOATS` and `INTEGERS`, `[num_rows]`, and `biased`, `bias`
            and `banned`, `[num_rows, at most so many tokens]`. A bias beyond a request's is 0, and
            what is banned repeats its first; -1 if nothing is.
    """
    logits.scatter_add_(1, own["biased"], own["bias"].to(logits.dtype))
    _penalize(logits, positions, history.long(), own)
    num_output = (positions - own["num_prompt"]).unsqueeze(1)
    banned = own["banned"]
    is_banned = (banned >= 0) & (num_output < own["min_tokens"].unsqueeze(1))
    banned = banned.clamp(min=0)
    logits.scatter_(1, banned, logits.gather(1, banned).masked_fill(is_banned, -torch.inf))


def _penalize(
    logits: Tensor, positions: Tensor, history: Tensor, own: Mapping[str, Tensor]
) -> None:
    repetition, presence, frequency = (own[name].float().unsqueeze(1) for name in FLOATS)
    indices = torch.arange(history.shape[1], device=logits.device)
    is_known = indices < positions.unsqueeze(1)
    # A place beyond stands for the first token again: twice the same is written there.
    ids = torch.where(is_known, history, history[:, :1])
    is_output = is_known & (indices >= own["num_prompt"].unsqueeze(1))
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    counts = counts.scatter_add_(1, ids, is_output.int()).gather(1, ids)
    scores = logits.gather(1, ids).float()
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(repetition == 1, scores, repeated.to(logits.dtype).float())
    penalties = presence + frequency * counts
    scores = torch.where(counts > 0, scores - penalties, scores)
    logits.scatter_(1, ids, scores.to(logits.dtype))


def columns_of(
    sequences: Items[Sequence], eos_token_ids: frozenset[int]
) -> dict[str, list[list[int]] | list[list[float]] | list[int] | list[float]]:
    """The columns of `adjust`, for sequences that it adjusts and for others."""
    params = [sequence.params for sequence in sequences]
    biased, bias, banned = [], [], []
    for sequence, each in zip(sequences, params, strict=True):
        here = is_adjusted_here(sequence, eos_token_ids)
        changes = each.logit_bias if here else {}
        missing = MAX_BIASED - len(changes)
        biased.append([*changes, *[0] * missing])
        bias.append([*changes.values(), *[0.0] * missing])
        ends = banned_of(sequence, eos_token_ids) if here else []
        first = ends[0] if ends else -1
        banned.append([*ends, *[first] * (MAX_BANNED - len(ends))])
    return {
        "repetition": [each.repetition_penalty for each in params],
        "presence": [each.presence_penalty for each in params],
        "frequency": [each.frequency_penalty for each in params],
        "num_prompt": [sequence.num_prompt_tokens for sequence in sequences],
        "min_tokens": [each.min_tokens for each in params],
        "biased": biased,
        "bias": bias,
        "banned": banned,
    }
