"""What a request changes in the verifier's logits, row by row, and log probabilities.

A row behind drafts is changed as if they had been accepted, which is the only case in which it is
used, so speculation changes no token here either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from tandem.requests.logprobs import TokenLogprobs
from tandem.requests.sequence import Sequence

_BITS = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1 == 1  # [256, 8]


def adjust(
    logits: Tensor, sequence: Sequence, draft_ids: Items[int], eos_token_ids: frozenset[int]
) -> None:
    """Applies a request's bias, penalties, bans and grammar, in place.

    Args:
        logits: `[len(draft_ids) + 1, vocab_size]`; row i is behind i drafts.
        sequence: whose tokens come before the drafts.
        draft_ids: what the verifier was given to check.
        eos_token_ids: the model's, for `min_tokens`.
    """
    params = sequence.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        bias = torch.tensor(list(params.logit_bias.values()), device=logits.device)
        logits[:, ids] += bias.to(logits.dtype)
    if params.has_penalties:
        for row, output_ids in _outputs(logits, sequence, draft_ids):
            _penalize(row, sequence, Counter(output_ids))
    if sequence.bad_words or params.min_tokens:
        for row, output_ids in _outputs(logits, sequence, draft_ids):
            banned = _banned(sequence, output_ids, eos_token_ids)
            row[torch.tensor(sorted(banned), dtype=torch.long, device=row.device)] = -torch.inf
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[:, allowed].clone()
        logits.fill_(-torch.inf)
        logits[:, allowed] = kept
    if sequence.grammar is not None:
        _mask(logits, sequence.grammar.masks(draft_ids))


def is_adjusted(sequence: Sequence) -> bool:
    """Whether `adjust` does anything for this request."""
    params = sequence.params
    banned = sequence.bad_words or params.min_tokens or params.allowed_token_ids
    biased = params.logit_bias or params.has_penalties
    return bool(biased or banned or sequence.grammar is not None)


def _outputs(
    logits: Tensor, sequence: Sequence, draft_ids: Items[int]
) -> list[tuple[Tensor, list[int]]]:
    """Each row with the output that would stand before it."""
    known = sequence.output_ids
    return [(row, known + list(draft_ids[:count])) for count, row in enumerate(logits)]


def _penalize(row: Tensor, sequence: Sequence, counts: Counter[int]) -> None:
    """Penalties as in vLLM: repetition for prompt and output, the others for the output alone."""
    params = sequence.params
    if params.repetition_penalty != 1:
        seen = set(sequence.token_ids[: sequence.num_prompt_tokens]) | set(counts)
        ids = torch.tensor(sorted(seen), device=row.device)
        scores = row[ids].float()
        penalty = params.repetition_penalty
        row[ids] = torch.where(scores > 0, scores / penalty, scores * penalty).to(row.dtype)
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=row.device)
        penalties = params.presence_penalty + params.frequency_penalty * times
        row[ids] = (row[ids].float() - penalties).to(row.dtype)


def _banned(sequence: Sequence, output_ids: list[int], eos_token_ids: frozenset[int]) -> set[int]:
    """Tokens that would complete a bad word, or end the text too early."""
    params = sequence.params
    banned = set()
    for *before, last in sequence.bad_words:
        if not before or output_ids[-len(before) :] == before:
            banned.add(last)
    if len(output_ids) < params.min_tokens:
        banned |= {*eos_token_ids, *params.stop_token_ids}
    return banned


def _mask(logits: Tensor, masks: list[bytes]) -> None:
    """Leaves only the tokens whose bit is set; a token beyond the tokenizer's has none."""
    for row, mask in zip(logits, masks, strict=True):
        allowed = _BITS[torch.frombuffer(bytearray(mask), dtype=torch.uint8).int()].flatten()
        row.masked_fill_(~allowed[: len(row)].to(row.device), -torch.inf)


def token_logprobs(scores: Tensor, token_ids: Items[int], num_top: int) -> list[TokenLogprobs]:
    """The log probabilities of chosen tokens.

    Args:
        scores: logits as the verifier made them, `[at least len(token_ids), vocab_size]`.
        token_ids: the token chosen in each row.
        num_top: how many of the likeliest tokens to report.
    """
    logprobs = scores[: len(token_ids)].float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=scores.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(num_top, dim=-1)
    top = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    columns = zip(token_ids, chosen.squeeze(1).tolist(), ranks.tolist(), top, strict=True)
    return [TokenLogprobs(*column) for column in columns]
