"""What requests change in logits, on the device, against the same on the host."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem import SamplingParams
from tandem.requests.sequence import Sequence
from tandem.rounds.adjusting import adjust, columns_of, is_adjusted_here
from tandem.sampling import processors

VOCAB, LENGTH = 30, 16
EOS = frozenset({1, 2})
PARAMS = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -0.2]),
        "min_tokens": st.sampled_from([0, 0, 3, 9]),
        "stop_token_ids": st.sampled_from([(), (5,)]),
        "logit_bias": st.sampled_from([{}, {0: 2.0, 7: -3.0}, {3: 100.0}]),
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 9999))
def test_logits_have_the_same_bits(
    dtype: torch.dtype, requests: list[dict[str, Any]], seed: int
) -> None:
    """Rows behind drafts too, and tokens of others that lie behind a sequence's own."""
    rng = random.Random(seed)
    sequences, rows, positions, expected, history = [], [], [], [], []
    for number, values in enumerate(requests):
        token_ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
        params = SamplingParams(max_tokens=20, **values)
        sequence = Sequence(number, token_ids, rng.randint(1, len(token_ids)), params, 0, "none", 0)
        drafts = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))]
        generator = torch.Generator().manual_seed(seed + number)
        logits = torch.randn(len(drafts) + 1, VOCAB, generator=generator).to(dtype)
        rows.append(logits.clone())
        processors.adjust(logits, sequence, drafts, EOS)
        expected.append(logits)
        sequences += [sequence] * len(logits)
        positions += range(len(token_ids), len(token_ids) + len(logits))
        known = token_ids + drafts
        junk = [rng.randrange(VOCAB) for _ in range(LENGTH - len(known))]
        history += [known + junk] * len(logits)
        assert is_adjusted_here(sequence, EOS) == processors.is_adjusted(sequence)
    columns = {name: torch.tensor(each) for name, each in columns_of(sequences, EOS).items()}
    found = torch.cat(rows)
    adjust(found, torch.tensor(positions), torch.tensor(history, dtype=torch.int32), columns)
    assert torch.equal(found, torch.cat(expected))
