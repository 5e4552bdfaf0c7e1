"""How an assistant starts: as the verifier's own last layers, behind the best linear shortcut.

Or as one that was trained before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.drafters.assistant import (
    Assistant,
    AssistantConfig,
    check_fingerprint,
    fingerprint,
    layers_config,
)
from tandem.errors import ConfigError
from tandem.models.checkpoint import load_model
from tandem_train.corpus import TrainingText
from tandem_train.features import DENSE_ATTENTION, Recorder, verifier_states

# A share of each input's mean square.
_RIDGE = 1e-3


def draft_vocabulary(texts: Iterable[TrainingText], size: int) -> list[int]:
    """The `size` most frequent tokens, or all that occur if they are fewer; in ascending order."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.token_ids)
    return sorted(token_id for token_id, _ in counts.most_common(size))


def default_source_layers(verifier: PreTrainedModel) -> list[int]:
    """The verifier's last storing layer of each type; its last two where all are of one type."""
    config = verifier.config.get_text_config()
    count = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    kinds = (getattr(config, "layer_types", None) or [""] * count)[:count]
    last = {kind: index for index, kind in enumerate(kinds)}
    return sorted(last.values()) if len(last) > 1 else list(range(count))[-2:]


def new_assistant(
    verifier: PreTrainedModel, source_layers: Items[int], draft_token_ids: Items[int]
) -> Assistant:
    """An assistant whose layers are copies of the verifier's `source_layers`, in float32."""
    text_config = verifier.config.get_text_config()
    assistant: Any = Assistant(
        AssistantConfig(
            text_config=layers_config(text_config, source_layers),
            source_layers=list(source_layers),
            draft_vocab_size=len(draft_token_ids),
            verifier=fingerprint(text_config),
        )
    )
    assistant.to(device=verifier.device, dtype=torch.float32)
    assistant.draft_token_ids.copy_(torch.tensor(draft_token_ids))
    nn.init.eye_(assistant.post_projection.weight)
    weights = verifier.base_model.state_dict()
    for name, weight in assistant.model.state_dict().items():
        origin = _origin(name, source_layers)
        if origin in weights and weights[origin].shape == weight.shape:
            weight.copy_(weights[origin])
    assistant.attach(verifier)
    assistant.set_attn_implementation(DENSE_ATTENTION)
    made: Assistant = assistant
    return made


def trained_assistant(path: str, verifier: PreTrainedModel) -> Assistant:
    """An assistant that was trained before, in float32, to be trained further.

    Raises:
        ConfigError: there is none at `path`.
        DrafterMismatchError: it was trained for another verifier.
    """
    assistant = load_model(path, torch.float32, verifier.device)
    if not isinstance(assistant, Assistant):
        raise ConfigError(
            f"--start-from {path} is a {type(assistant).__name__}, not a drafter that this script "
            "trained"
        )
    check_fingerprint(assistant, verifier)
    assistant.train().requires_grad_(True)
    assistant.attach(verifier)
    assistant.set_attn_implementation(DENSE_ATTENTION)
    return assistant


def _origin(name: str, source_layers: Items[int]) -> str:
    head, found, tail = name.partition("layers.")
    if not found:
        return name
    index, _, rest = tail.partition(".")
    return f"{head}layers.{source_layers[int(index)]}.{rest}"


@torch.inference_mode()
def fit_pre_projection(
    assistant: Assistant, verifier: PreTrainedModel, token_batches: Iterable[Tensor]
) -> None:
    """Fits the map from the assistant's inputs to what its first layer read in the verifier.

    Ridge regression over every position of `token_batches`, each `[batch, length]`.
    """
    layers = _decoder_layers(verifier)
    entering: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    handle = layers[assistant.config.source_layers[0]].register_forward_pre_hook(
        keep, with_kwargs=True
    )
    width = assistant.pre_projection.in_features
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment = torch.zeros(width, assistant.pre_projection.out_features, dtype=torch.float64)
    try:
        for token_ids in token_batches:
            hidden = verifier_states(verifier, token_ids, Recorder(()))
            embedded = verifier.get_input_embeddings()(token_ids)
            inputs = torch.cat([embedded[:, 1:], hidden[:, :-1]], dim=-1)
            rows = inputs.flatten(0, 1).double().cpu()
            gram += rows.T @ rows
            moment += rows.T @ entering.pop()[:, 1:].flatten(0, 1).double().cpu()
    finally:
        handle.remove()
    gram.diagonal().mul_(1 + _RIDGE)
    solution = torch.linalg.solve(gram, moment)
    assistant.pre_projection.weight.copy_(solution.T)


def _decoder_layers(verifier: PreTrainedModel) -> nn.ModuleList:
    count = verifier.config.get_text_config().num_hidden_layers
    return next(
        module
        for module in verifier.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
