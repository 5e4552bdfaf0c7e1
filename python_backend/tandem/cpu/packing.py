"""Lays models out for oneDNN: which of their layers are packed, joined or rounded."""

from __future__ import annotations

import os
from collections.abc import Sequence as Items

import torch
from torch import nn
from transformers import PreTrainedModel

from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.linear import Int8Linear, PackedLinear
from tandem.cpu.tied_embedding import TiedEmbedding, read_from, tied_embedding
from tandem.joined_linear import LinearPart, joined, split

# Matrices of at least this size gain from 8 bits.
_INT8_SIZE = 2**17
# oneDNN keeps the code of 1,024 products, and torch as many descriptions of them: 0.8 MB for each
# number of rows of each matrix's shape. To make one anew takes 0.4 ms, so fewer do.
_KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "128"}


def keep_few_products() -> None:
    """Bounds what products leave behind in memory; of use before the process's first one.

    What the environment sets stays.
    """
    for name, number in _KEPT_PRODUCTS.items():
        os.environ.setdefault(name, number)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed products for this device and type."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack_linears(
    model: nn.Module,
    keep: nn.Module | None = None,
    *,
    int8: bool = False,
    groups: Items[Items[nn.Linear]] = (),
) -> None:
    """Replaces every `nn.Linear` in `model` but `keep`, which stays as it is.

    Args:
        int8: whether large matrices may be rounded to 8 bits for the product of a few rows.
        groups: layers that always read the same rows, one after the other.
    """
    assert keep is None or not groups
    parts: dict[nn.Module, LinearPart] = {}
    for group in groups:
        parts |= split(PackedLinear(joined(group)), group)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in parts:
                setattr(module, name, parts[child])
            elif type(child) is nn.Linear and child is not keep:
                rounds = int8 and child.bias is None and child.weight.numel() >= _INT8_SIZE
                setattr(module, name, Int8Linear(child) if rounds else PackedLinear(child))


def pack_model(model: PreTrainedModel, groups: Items[Items[nn.Linear]]) -> None:
    """Packs a model's linear layers, and lets embeddings that are its output head's weights be so.

    Args:
        groups: see `pack_linears`.
    """
    embedding = tied_embedding(model)
    pack_linears(model, groups=groups)
    head = model.get_output_embeddings()
    if embedding is not None and head is not None and (matrix := head_matrix(head)) is not None:
        read_from(embedding, matrix)
    release_file(model)


def release_file(model: nn.Module) -> None:
    """Copies what isn't packed: a single weight in the checkpoint's file keeps all of it mapped."""
    for module in model.modules():
        if not isinstance(module, TiedEmbedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def pack_drafter(drafter: nn.Module, keep: nn.Module | None = None) -> None:
    """Packs a drafter's linear layers; large ones may be rounded to 8 bits.

    Args:
        keep: see `pack_linears`.
    """
    pack_linears(drafter, keep, int8=True)
    release_file(drafter)


def head_matrix(head: nn.Module) -> BlockedMatrix | None:
    """Where the weights of an output head lie, if that is known.

    Args:
        head: a linear layer, packed or not, or what stands in its place and holds it.
    """
    for module in head.modules():
        if isinstance(module, PackedLinear):
            return module.matrix
    return BlockedMatrix.plain(head.get_parameter("weight").detach())
