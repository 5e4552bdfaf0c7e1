"""Requests that name no drafter are split by weight, which the metrics show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import requests

from stream import TIMEOUT, Stream, metric, wait_until
from tandem_runtime.server import TritonServer

NUM_REQUESTS = 1000
AT_ONCE = 100
WEIGHTS = {"ngram": 0.7, "none": 0.3}
HIGH_ACCEPTANCE = [0.9, 0.8]


@pytest.fixture
def repository_with(private_repository: Path) -> Path:
    """A model that splits its traffic, and accepts drafts by coin as a benchmark does."""
    path = private_repository / "tandem" / "1" / "model.json"
    values = json.loads(path.read_text())
    values |= {"drafter_weights": WEIGHTS, "synthetic_acceptance_rates": HIGH_ACCEPTANCE}
    path.write_text(json.dumps(values))
    return private_repository


def test_a_split_by_weight_shows_in_the_metrics(repository_with: Path) -> None:
    with TritonServer(repository_with) as server, Stream(server) as stream:
        for start in range(0, NUM_REQUESTS, AT_ONCE):
            for number in range(start, start + AT_ONCE):
                stream.send(str(number), "abab", max_tokens=4, ignore_eos=True)
            answers = stream.responses(AT_ONCE)
            assert [answer.error for answer in answers.values()] == [""] * AT_ONCE
        wait_until(lambda: metric(server, "request_success_total") == NUM_REQUESTS)
        page = requests.get(server.metrics_url, timeout=TIMEOUT).text
        counts = dict.fromkeys(WEIGHTS, 0.0)
        for labels, value in re.findall(r"^tandem:request_success_total{(.*)} (\S+)$", page, re.M):
            counts[re.findall('drafter="(.*?)"', labels)[0]] += float(value)
        for name, weight in WEIGHTS.items():
            assert counts[name] == pytest.approx(weight * NUM_REQUESTS, abs=0.02 * NUM_REQUESTS)
        # A benchmark with coins can't be taken for anything else.
        assert metric(server, "synthetic_acceptance") == 1
        assert metric(server, "spec_decode_num_accepted_tokens_total") > 0
