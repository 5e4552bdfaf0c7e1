"""The drafters that the configuration describes, on top of a loaded verifier."""

from __future__ import annotations

from tandem.config import EngineConfig
from tandem.drafter_config import DrafterConfig
from tandem.drafters.assistant import Assistant
from tandem.drafters.causal_lm import CausalLMDrafter
from tandem.drafters.combined import CombinedDrafter
from tandem.drafters.drafter import Drafter
from tandem.drafters.mtp import Gemma4Drafter, MTPDrafter, TrainedDrafter
from tandem.drafters.ngram import NgramDrafter
from tandem.errors import ConfigError
from tandem.models.checkpoint import load_model
from tandem.models.loading import LoadedVerifier
from tandem.wing import wing_of


def load_drafters(config: EngineConfig, verifier: LoadedVerifier) -> dict[str, Drafter]:
    """Makes the drafters that the configuration describes, and those that join two of them.

    Raises:
        ConfigError: a model can't be found or isn't of the type's kind.
        DrafterMismatchError: one doesn't fit the verifier.
    """
    drafters: dict[str, Drafter] = {}
    for name, settings in config.drafter_configs.items():
        drafters[name] = _load_drafter(settings, verifier, enforce_eager=config.enforce_eager)
    limits = config.max_lookaheads
    for ngram, model in config.drafter_pairs:
        lookup = drafters[ngram]
        assert isinstance(lookup, NgramDrafter)
        drafters[f"{ngram}+{model}"] = CombinedDrafter(
            lookup, drafters[model], limits[ngram], limits[model]
        )
    return drafters


def _load_drafter(
    settings: DrafterConfig, verifier: LoadedVerifier, *, enforce_eager: bool
) -> Drafter:
    if settings.type == "ngram":
        return NgramDrafter(
            settings.min_ngram_size, settings.max_ngram_size, settings.num_shared_tokens
        )
    if settings.type == "causal_lm":
        draft_model = verifier.draft_models[settings.name]
        return CausalLMDrafter(draft_model.model, draft_model.cache)
    assert settings.model is not None, "DrafterConfig lets no 'mtp' without a model through"
    return _load_mtp_drafter(settings.name, settings.model, verifier, enforce_eager=enforce_eager)


def _load_mtp_drafter(
    name: str, path: str, verifier: LoadedVerifier, *, enforce_eager: bool
) -> MTPDrafter:
    assistant = load_model(
        path, verifier.model.dtype, verifier.model.device, key=f"drafters.{name}.model"
    )
    wing = wing_of(assistant.device)
    if isinstance(assistant, Assistant):
        assistant.attach(verifier.model)
        wing.prepare_drafter(assistant)
        return TrainedDrafter(
            assistant, verifier.model, verifier.cache, enforce_eager=enforce_eager
        )
    if not hasattr(assistant, "pre_projection"):
        raise ConfigError(
            f"drafters.{name}: {path} is a {type(assistant).__name__}; type 'mtp' needs a Gemma 4 "
            "assistant or one that scripts/train_drafter.py made"
        )
    # The centroid head picks rows of this weight.
    wing.prepare_drafter(assistant, assistant.lm_head if assistant.masked_embedding else None)
    return Gemma4Drafter(assistant, verifier.model, verifier.cache)
