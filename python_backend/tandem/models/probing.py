"""What a model stores in the cache, and whether it runs on the engine's kinds of passes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from tandem.cache.kv_cache import KVCache, LayerShape
from tandem.errors import UnsupportedModelError
from tandem.models.attention import PackedBatch, Span
from tandem.requests.sequence import BlockTable

NUM_PROBE_TOKENS = 8
# A paged pass may differ from transformers' own by rounding alone: by the root mean square, a share
# of the logits' spread.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[list[LayerShape], Tensor]:
    """What each layer stores, and the model's own logits for a few tokens, one row each."""
    cache = DynamicCache(config=model.config)
    try:
        logits = model(input_ids=probe_ids(model), cache=cache, use_cache=True).logits
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} doesn't run on plain token ids: {error}"
        ) from error
    shapes = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DummyLayer):  # reuses another layer's keys and values
            continue
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a {type(layer).__name__} in layer {index}; the "
                "paged cache holds attention's keys and values only"
            )
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        if keys.shape != values.shape:
            raise UnsupportedModelError(
                f"{type(model).__name__} has keys of shape {tuple(keys.shape)} and values of "
                f"shape {tuple(values.shape)} in layer {index}; they must be alike"
            )
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        shapes.append(LayerShape(index, keys.shape[1], keys.shape[3], window))
    return shapes, logits[0]


def probe_ids(model: PreTrainedModel) -> Tensor:
    """A few tokens, `[1, NUM_PROBE_TOKENS]`."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = [(7 * i + 3) % vocab_size for i in range(NUM_PROBE_TOKENS)]
    return torch.tensor([ids], device=model.device)


@torch.inference_mode()
def check_paged(model: PreTrainedModel, cache: KVCache, expected: Tensor) -> None:
    """Runs the same tokens through the paged cache; any difference means that it doesn't fit.

    The tokens go through in two passes, so that the second reads what the first wrote. Each group
    has them in other blocks, so that a layer that reads by another group's table shows it.
    """
    ids, rows = probe_ids(model), []
    num_blocks = -(-NUM_PROBE_TOKENS // cache.block_size)
    tables = [
        BlockTable([(block + number) % group.num_blocks for block in range(num_blocks)])
        for number, group in enumerate(cache.groups)
    ]
    for start, stop in ((0, NUM_PROBE_TOKENS // 2), (NUM_PROBE_TOKENS // 2, NUM_PROBE_TOKENS)):
        span = Span(stop - start, stop, tables)
        packed = PackedBatch(
            [span], cache.block_size, model.dtype, model.device, windows=cache.windows
        )
        try:
            output = model(
                input_ids=ids[:, start:stop],
                position_ids=torch.arange(start, stop, device=model.device).unsqueeze(0),
                cache=cache.writer(packed.slots()),
                use_cache=True,
                packed=packed,
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} doesn't run on the paged cache: {error}"
            ) from error
        rows.append(output.logits[0].float())
    expected = expected.float()
    difference = (torch.cat(rows) - expected).square().mean().sqrt().item()
    allowed = _TOLERANCE[model.dtype] * max(1.0, expected.std().item())
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives other logits on the paged cache than on its own: they "
            f"differ by {difference:.3g}, and rounding explains {allowed:.3g}"
        )
