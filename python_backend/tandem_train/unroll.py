"""The assistant run ahead over whole texts, as serving would run it from each position."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from tandem.drafters.assistant import Assistant, SharedKV
from tandem_train.corpus import TrainingText
from tandem_train.features import Features, FeatureStore, Visible


@dataclass
class StepResult:
    """One guess ahead, over all positions of a batch."""

    logits: Tensor  # [batch, length, draft_vocab_size]
    loss: Tensor
    accepted: Tensor  # [batch, length], whether this and all guesses before it equal the text
    counted: Tensor  # [batch, length], positions that lie inside their text


def unroll(assistant: Assistant, features: Features, num_steps: int) -> Iterator[StepResult]:
    """Runs the assistant ahead from every position at once, fed with the text as it is.

    Step 1 stands at the last known token t, reads the state at t - 1 and the keys before t, and
    guesses token t + 1, as in serving. Every later step is fed with the next token and the state
    that the step before returned; position and keys stay. (HASS and EAGLE-3 train in this way.)
    """
    assert assistant.head is not None
    tokens, length = features.token_ids, features.token_ids.shape[1]
    positions = torch.arange(1, length, device=tokens.device).unsqueeze(0)
    with torch.no_grad():
        # [batch, length, draft_vocab_size]; position t holds the law of token t + 1.
        target = assistant.head(features.hidden).softmax(dim=-1)
    state = features.hidden[:, :-1]
    cache = SharedKV(features.sources)
    accepted: Tensor | None = None
    for step in range(1, num_steps + 1):
        count = length - step
        state = assistant(
            tokens[:, step:],
            state[:, :count],
            positions[:, :count],
            cache,
            visible=Visible(1, causal=False),
        )
        logits = assistant.head(state)
        counted = (positions[:, :count] + step - 1) < features.lengths.unsqueeze(1)
        entropy = -(target[:, step:] * log_softmax(logits, dim=-1)).sum(dim=-1)
        loss = (entropy * counted).sum() / counted.sum()
        # The text's next token is known up to its end.
        known = (positions[:, : count - 1] + step) < features.lengths.unsqueeze(1)
        guess = assistant.draft_token_ids[logits[:, :-1].detach().argmax(dim=-1)]
        hit = (guess == tokens[:, step + 1 :]) & known
        accepted = hit if accepted is None else accepted[:, : count - 1] & hit
        yield StepResult(logits, loss, accepted, known)


@torch.inference_mode()
def acceptance(
    assistant: Assistant,
    store: FeatureStore,
    texts: Items[TrainingText],
    num_steps: int,
    batch_size: int = 8,
) -> list[float]:
    """For each step, the share of positions at which it and those before it guess the text.

    On greedy text this is what greedy serving accepts from an average position.
    """
    hits, counts = [0] * num_steps, [0] * num_steps
    for start in range(0, len(texts), batch_size):
        features = store.batch(texts[start : start + batch_size])
        for step, result in enumerate(unroll(assistant, features, num_steps)):
            hits[step] += int(result.accepted.sum())
            counts[step] += int(result.counted.sum())
    return [hit / max(1, count) for hit, count in zip(hits, counts, strict=True)]
