"""Which round an engine has."""

from __future__ import annotations

from collections.abc import Mapping

from tandem.config import EngineConfig
from tandem.drafters.drafter import Drafter
from tandem.models.verifier import Verifier
from tandem.rounds.device import DeviceRound
from tandem.rounds.host import HostRound
from tandem.rounds.round import Round
from tandem.wing import wing_of


def make_round(
    verifier: Verifier,
    drafters: Mapping[str, Drafter],
    eos_token_ids: frozenset[int],
    config: EngineConfig,
    max_model_len: int,
) -> Round:
    """One on the device, where the wing can run it.

    Args:
        drafters: by name.
        eos_token_ids: the verifier's.
    """
    model = verifier.model
    tools = wing_of(model.device).round_tools(model.dtype)
    if tools is not None:
        return DeviceRound(verifier, drafters, eos_token_ids, config, max_model_len, tools)
    return HostRound(verifier, drafters, eos_token_ids, config.synthetic_acceptance_rates)
