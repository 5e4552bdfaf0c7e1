"""Input embeddings whose weights are those of the output head, which packs them in its own way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.cpu.blocked_matrix import BlockedMatrix


class TiedEmbedding(nn.Embedding):
    """Reads its rows in the head's memory; its `weight` has a shape and a type, but no numbers."""

    memory: Tensor

    def forward(self, token_ids: Tensor) -> Tensor:
        """`[...]` to `[..., embedding_dim]`."""
        shape = (self.num_embeddings, self.embedding_dim)
        return BlockedMatrix(self.memory, shape).gather(token_ids)


def tied_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The model's input embeddings, if their weight is its output head's too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or head is None:
        return None
    return embedding if embedding.weight.data_ptr() == head.weight.data_ptr() else None


def read_from(embedding: nn.Embedding, matrix: BlockedMatrix) -> None:
    """Makes a `TiedEmbedding` of an embedding, in place, and drops its weight.

    Args:
        matrix: with the same rows.
    """
    kind, weight = type(embedding), embedding.weight
    assert tuple(weight.shape) == matrix.shape
    # What a model's own kind does, it does to what the class behind it gives.
    is_plain = kind is nn.Embedding
    embedding.__class__ = (
        TiedEmbedding if is_plain else type(kind.__name__, (kind, TiedEmbedding), {})
    )
    embedding.register_buffer("memory", matrix.memory, persistent=False)
    nothing = torch.full((1, 1), torch.nan, dtype=weight.dtype)
    embedding.weight = nn.Parameter(nothing.expand(weight.shape), requires_grad=False)
