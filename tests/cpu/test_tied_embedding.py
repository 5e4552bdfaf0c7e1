"""Weights lie in memory once: embeddings read the packed head, and no file stays mapped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from doubles import plain, prompt_of
from tandem import SamplingParams
from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.linear import PackedLinear
from tandem.cpu.packing import can_pack, head_matrix
from tandem.cpu.tied_embedding import TiedEmbedding, read_from
from tiny_engines import DEVICE, Engines, TinyModels

DTYPES = [t for t in (torch.float32, torch.bfloat16) if can_pack(torch.device("cpu"), t)]
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not DTYPES, reason="weights are packed on CPUs with oneDNN"
)


def packed(matrix: torch.Tensor) -> BlockedMatrix | None:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return PackedLinear(linear).matrix


@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(2, 300),
    num_columns=st.integers(2, 200),
    start=st.integers(0, 300),
    count=st.integers(0, 100),
)
def test_rows_of_a_packed_matrix(
    dtype: torch.dtype, num_rows: int, num_columns: int, start: int, count: int
) -> None:
    matrix = torch.randn(num_rows, num_columns).to(dtype)
    indices = torch.randint(num_rows, (2, 7))
    for found in (packed(matrix), BlockedMatrix.plain(matrix)):
        assert found is not None
        assert found.shape == (num_rows, num_columns)
        assert torch.equal(found.rows(start, start + count), matrix[start : start + count])
        assert torch.equal(found.gather(indices), matrix[indices])


class Scaled(nn.Embedding):
    """Does something besides, as Gemma's does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * torch.tensor(3.0, dtype=self.weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@torch.inference_mode()
def test_an_embedding_reads_a_packed_matrix(kind: type[nn.Embedding], dtype: torch.dtype) -> None:
    embedding = kind(384, 40, padding_idx=0, dtype=dtype)
    token_ids = torch.tensor([[0, 383, 7, 7, 64]])
    expected = embedding(token_ids)
    matrix = packed(embedding.weight.detach().clone())
    assert matrix is not None
    read_from(embedding, matrix)
    assert torch.equal(embedding(token_ids), expected)
    assert isinstance(embedding, (kind, TiedEmbedding))
    # Who reads it anyhow must not find numbers.
    assert embedding.weight.shape == (384, 40)
    assert embedding.weight.isnan().all()
    assert embedding.weight.untyped_storage().nbytes() == dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_models_weights_lie_in_memory_once(
    engines: Engines, tiny: TinyModels, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The verifier's, and those of a model that drafts."""
    path = shutil.copytree(tiny.verifier("gemma-3"), tmp_path / "model")
    engine = engines.make(
        "gemma-3",
        dtype=str(dtype).removeprefix("torch."),
        verifier=str(path),
        drafters={"causal_lm": {"model": str(path), "num_speculative_tokens": 2}},
    )
    for model in (engine.verifier.model, engine.drafters["causal_lm"]._model):  # type: ignore[attr-defined]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        matrix = head_matrix(head)
        assert isinstance(embedding, TiedEmbedding)
        assert matrix is not None
        assert embedding.memory.data_ptr() == matrix.memory.data_ptr()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_another_layout_only_takes_more_memory(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it may be on other processors: embeddings keep a weight of their own."""
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    requests = [(prompt_of(length), params) for length in (1, 9, 40)]
    expected = plain(engines("gemma-3"), requests)
    monkeypatch.setattr("tandem.cpu.blocked_matrix._BLOCKS", ())
    monkeypatch.setattr("tandem.cpu.blocked_matrix._known", {})
    engine = engines.make("gemma-3")
    assert not isinstance(engine.verifier.model.get_input_embeddings(), TiedEmbedding)
    assert plain(engine, requests) == expected
