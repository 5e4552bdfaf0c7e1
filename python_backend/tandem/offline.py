"""Generating for a list of prompts, without a server."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

from tandem.errors import InvalidRequestError, RequestCancelledError
from tandem.lifecycle import Lifecycle
from tandem.requests.logprobs import TokenLogprobs
from tandem.requests.outputs import Delta, RequestOutput
from tandem.requests.params import SamplingParams
from tandem.requests.sequence import Sequence
from tandem.requests.text import Tokenizer


def params_of_each(
    params: SamplingParams | Items[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams | None]:
    """One for each prompt.

    Raises:
        InvalidRequestError: there are more or fewer of them.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    each: list[SamplingParams | None] = list(params)
    if len(each) != num_prompts:
        raise InvalidRequestError(f"{num_prompts} prompts, but {len(each)} params")
    return each


def run(
    sequences: Items[Sequence],
    lifecycle: Lifecycle,
    step: Callable[[], list[Delta]],
    tokenizer: Tokenizer | None,
) -> Iterator[RequestOutput]:
    """Runs all sequences in one continuous batch; yields in their order.

    A step that failed, or a caller that stops early, leaves nothing behind.
    """
    logprobs: dict[Sequence, list[TokenLogprobs]] = defaultdict(list)
    for sequence in sequences:
        lifecycle.add(sequence)
    try:
        for sequence in sequences:
            while not sequence.is_finished:
                for delta in step():
                    logprobs[delta.sequence] += delta.logprobs
            yield RequestOutput.of(sequence, logprobs.pop(sequence, []), tokenizer)
    finally:
        lifecycle.end(sequences, RequestCancelledError("the caller stopped"))
