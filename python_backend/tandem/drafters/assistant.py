"""The assistant that Tandem trains for verifiers which come without one.

It is to any verifier what a Gemma 4 assistant is to Gemma 4: a few decoder layers that read the
verifier's own K/V, fed with the last known token and the verifier's last hidden state. Its layers
are of the verifier's own class, so they attend to the verifier's keys with the right RoPE, head
sizes and norms whatever the architecture, and can start as copies of the verifier's layers.

A checkpoint holds no embeddings: they are the verifier's, and the output head is the rows of the
verifier's own head for the draft vocabulary, the tokens that are worth guessing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from tandem.cache.kv_cache import CacheStandIn
from tandem.errors import DrafterMismatchError

MODEL_TYPE = "tandem_assistant"
# Parts of a verifier's layers that need more than K/V and hidden states, as Gemma 4 names them.
_PLAIN_LAYERS: dict[str, Any] = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
}


class AssistantConfig(PreTrainedConfig):
    """Configuration of an `Assistant`.

    Attributes:
        text_config: the layers, a configuration of the verifier's own class.
        source_layers: for each layer, the verifier's layer whose K/V it reads.
        draft_vocab_size: how many tokens it can guess.
        verifier: what identifies the verifier that it was trained for; see `fingerprint`.
        trained_length: tokens of the longest texts that it was trained on.
    """

    model_type = MODEL_TYPE
    # The class goes by the model type in the file; the one here is only a formality.
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    source_layers: list[int] | None = None
    draft_vocab_size: int = 1
    verifier: dict[str, Any] | None = None
    trained_length: int | None = None


class SharedKV(CacheStandIn):
    """The cache of an assistant: each layer gets the K/V that the verifier wrote.

    What a layer computes as key and value of its own is dropped, so nothing has to be rolled back.
    """

    def __init__(self, layers: Items[tuple[Tensor, Tensor]]) -> None:
        self._layers = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """K and V of the verifier's layer that this one reads."""
        return self._layers[layer_idx]


class Assistant(PreTrainedModel):
    """Guesses a token from the last known one and a hidden state of the verifier."""

    config_class = AssistantConfig
    base_model_prefix = "assistant"
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__(config)
        assert isinstance(config.text_config, PreTrainedConfig)
        width = config.text_config.hidden_size
        self.pre_projection = nn.Linear(2 * width, width, bias=False)
        self.model = AutoModel.from_config(config.text_config)
        self.post_projection = nn.Linear(width, width, bias=False)
        self.draft_token_ids = nn.Buffer(torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.embed: nn.Module | None = None
        self.head: nn.Module | None = None
        self.post_init()  # type: ignore[no-untyped-call]

    def attach(self, verifier: PreTrainedModel) -> None:
        """Takes embeddings and head from the verifier; they are no part of the checkpoint."""
        weight: Tensor = verifier.get_output_embeddings().weight.detach()
        rows = weight[self.draft_token_ids].to(self.dtype)
        head = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(rows, requires_grad=False)
        self.head = head
        # Not registered: these are the verifier's own weights.
        object.__setattr__(self, "embed", verifier.get_input_embeddings())

    def forward(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        position_ids: Tensor,
        cache: SharedKV,
        **kwargs: Any,
    ) -> Tensor:
        """One guess further.

        Args:
            token_ids: `[batch, length]`, the last known or guessed token.
            hidden: `[batch, length, hidden_size]`, what stood before it: the verifier's state after
                its last norm, or what the previous step returned.
            position_ids: `[batch, length]`, the position of the last known token in every step.
            kwargs: for the attention function.

        Returns:
            The next state, `[batch, length, hidden_size]`, in the verifier's space: `head` makes
            logits over the draft vocabulary of it.
        """
        assert self.embed is not None, "attach() comes first"
        inputs = torch.cat([self.embed(token_ids).to(hidden.dtype), hidden], dim=-1)
        output = self.model(
            inputs_embeds=self.pre_projection(inputs),
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
            **kwargs,
        )
        state: Tensor = self.post_projection(output.last_hidden_state)
        return state


def layers_config(verifier: PreTrainedConfig, source_layers: Items[int]) -> PreTrainedConfig:
    """The configuration of layers like the verifier's `source_layers`, without embeddings."""
    values = verifier.to_dict()
    changes: dict[str, Any] = {"num_hidden_layers": len(source_layers), "vocab_size": 1}
    changes |= {name: None for name in values if name.endswith("_token_id")}
    if values.get("layer_types"):
        changes["layer_types"] = [values["layer_types"][index] for index in source_layers]
    if per_layer := values.get("per_layer_config"):  # keyed by numbers, or by text from a file
        by_index = {int(index): settings for index, settings in per_layer.items()}
        changes["per_layer_config"] = {
            position: by_index[index]
            for position, index in enumerate(source_layers)
            if index in by_index
        }
    changes |= {name: value for name, value in _PLAIN_LAYERS.items() if name in values}
    dropped = ("architectures", "dtype", "_model_name_or_path")
    values = {name: value for name, value in (values | changes).items() if name not in dropped}
    config = type(verifier)(**values)
    config.name_or_path = ""
    return config


def fingerprint(verifier: PreTrainedConfig) -> dict[str, Any]:
    """What must agree between the verifier that an assistant was trained for and another."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(verifier, name) for name in names}


def check_fingerprint(assistant: Assistant, verifier: PreTrainedModel) -> None:
    """Compares the verifier that the assistant was trained for with this one.

    Raises:
        DrafterMismatchError: naming the first thing that differs, and both values.
    """
    found = fingerprint(verifier.config.get_text_config())
    for name, trained_for in (assistant.config.verifier or {}).items():
        if found.get(name) != trained_for:
            raise DrafterMismatchError(
                f"the drafter was trained for another verifier: {name} is {trained_for} there and "
                f"{found.get(name)} here"
            )


AutoConfig.register(MODEL_TYPE, AssistantConfig)
AutoModel.register(AssistantConfig, Assistant)
