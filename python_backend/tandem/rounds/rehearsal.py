"""The largest passes that there can be, each run once to see what memory they take."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tandem.acceptance.scoring import NUM_ROWS
from tandem.config import EngineConfig
from tandem.drafter_config import NO_DRAFTER
from tandem.drafters.drafter import Drafter
from tandem.models.loading import LoadedVerifier
from tandem.requests.params import MAX_LOGPROBS, SamplingParams
from tandem.requests.sequence import BlockTable, Draft, ScheduledSequence, Sequence
from tandem.rounds.round import Round
from tandem.sampling.processors import token_logprobs

# Sampled by the host, and all that it can be asked for.
_PARAMS = SamplingParams(
    top_k=50, top_p=0.9, presence_penalty=1.0, logit_bias={0: 1.0}, logprobs=MAX_LOGPROBS
)


@torch.inference_mode()
def rehearse(
    round_: Round,
    drafters: Mapping[str, Drafter],
    loaded: LoadedVerifier,
    config: EngineConfig,
) -> None:
    """Computes the largest chunks of prompts, then a step with the most drafts.

    Each sequence is as long as one can be. All of them share the blocks that there are, so what
    they read is nobody's text.

    Args:
        drafters: by name; they draft as many tokens as they ever do.

    Raises:
        torch.OutOfMemoryError: they don't fit.
    """
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    share, known = config.max_num_batched_tokens // count, loaded.max_model_len - 1
    chunk = min(known, share)
    depth = max(0, min(max(config.max_lookaheads.values()), share - 1, known - 2))
    sequences = [_sequence(-1 - n, known, loaded, config) for n in range(count)]
    for sequence in sequences:
        sequence.num_computed = known - chunk
    _run(round_, drafters, [ScheduledSequence(s, chunk, 0) for s in sequences])
    for sequence in sequences:
        sequence.num_computed = known - depth - 1
        del sequence.token_ids[known - depth :]
    for name in drafters if depth else ():
        round_.guess(name, sequences, min(depth, config.max_lookaheads[name]))
    draft = Draft([0] * depth)
    _run(round_, drafters, [ScheduledSequence(s, 1, depth, draft) for s in sequences])
    for sequence in sequences:
        for drafter in drafters.values():
            drafter.forget(sequence)


def _run(round_: Round, drafters: Mapping[str, Drafter], batch: list[ScheduledSequence]) -> None:
    for drafter in drafters.values():
        drafter.prefill(batch)
    output = round_.verify(batch)
    token_logprobs(output.logits([0] * NUM_ROWS), [0] * NUM_ROWS, MAX_LOGPROBS)
    verdicts = round_.accept(batch, output)
    for name in drafters:
        for scheduled in batch:
            scheduled.sequence.drafter = name
        round_.observe(batch, output, verdicts)


def _sequence(number: int, length: int, loaded: LoadedVerifier, config: EngineConfig) -> Sequence:
    """One of `length` known tokens, in whatever blocks there are."""
    num_blocks = -(-loaded.max_model_len // config.block_size)
    return Sequence(
        id=number,
        token_ids=[0] * length,
        num_prompt_tokens=length,
        params=_PARAMS,
        seed=0,
        drafter=NO_DRAFTER,
        max_lookahead=0,
        block_tables=[
            BlockTable([block % group.num_blocks for block in range(num_blocks)])
            for group in loaded.cache.groups
        ],
    )
