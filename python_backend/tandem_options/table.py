"""The one table of options.

Names, types and meanings are those of the servers whose clients come here; where they have several
names for one thing, the first is the canonical one, vLLM's where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Kind = Literal[
    "any",
    "bool",
    "int",
    "float",
    "str",
    "ints",
    "floats",
    "strings",
    "texts",
    "biases",
    "object",
    "objects",
]


class Fate(Enum):
    """What becomes of an option."""

    HONOURED = "honoured"
    # Taken where it asks for nothing; any other value would change the answer and is refused.
    NOTHING = "nothing"
    # Changes no answer, whatever its value.
    IGNORED = "ignored"


@dataclass(frozen=True)
class Option:
    """An option of a request.

    Attributes:
        name: the canonical name.
        whose: servers whose name it is, and after commas those of the aliases: V for vLLM, L for
            TensorRT-LLM, S for SGLang, N for NVIDIA's `nvext`, O for OpenAI, T for Tandem.
        kind: of its values; see `tandem_options.values`.
        aliases: other names for it.
        fate: what becomes of it.
        nothing: values that ask for nothing.
        cure: what to do instead, where other values are refused.
        unset: names under which a value means that the option is not given.
    """

    name: str
    whose: str
    kind: Kind = "any"
    aliases: tuple[str, ...] = ()
    fate: Fate = Fate.HONOURED
    nothing: tuple[Any, ...] = ()
    cure: str = ""
    unset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical one first."""
        return (self.name, *self.aliases)


def _nothing(name: str, whose: str, kind: Kind, *values: Any, cure: str = "") -> Option:
    return Option(name, whose, kind, fate=Fate.NOTHING, nothing=values, cure=cure)


_HONOURED = (
    # How tokens are chosen.
    Option("max_tokens", "V L, O, S", "int", ("max_completion_tokens", "max_new_tokens")),
    Option("min_tokens", "V, L, S", "int", ("min_length", "min_new_tokens")),
    Option("temperature", "V L", "float"),
    Option("top_k", "V L", "int"),
    Option("top_p", "V L", "float", unset={"top_p": 0.0}),
    Option("min_p", "V", "float"),
    Option("greed_sampling", "N", "bool"),
    Option("repetition_penalty", "V L", "float"),
    Option("presence_penalty", "V L", "float"),
    Option("frequency_penalty", "V L", "float"),
    Option("logit_bias", "V", "biases"),
    Option("allowed_token_ids", "V", "ints"),
    Option("embedding_bias_words", "L", "strings"),
    Option("embedding_bias_weights", "L", "floats"),
    Option("bad_words", "V L", "texts"),
    Option("stop", "V, L", "texts", ("stop_words",)),
    Option("stop_token_ids", "V", "ints"),
    Option("end_id", "L", "int"),
    Option("include_stop_str_in_output", "V, S", "bool", ("no_stop_trim",)),
    Option("ignore_eos", "V", "bool"),
    Option("seed", "V, L, S", "int", ("random_seed", "sampling_seed"), unset={"random_seed": 0}),
    Option("n", "V, L", "int", ("num_return_sequences",)),
    # What the text must match.
    Option("structured_outputs", "V", "object", ("guided_decoding",)),
    Option("response_format", "O", "object"),
    Option("guided_json", "V N, S", "any", ("json_schema",)),
    Option("guided_regex", "V N, S", "str", ("regex",)),
    Option("guided_choice", "V N", "strings"),
    Option("guided_grammar", "V N, S", "str", ("ebnf",)),
    Option("guided_whitespace_pattern", "V N", "str"),
    Option("guided_decoding_guide_type", "L", "str"),
    Option("guided_decoding_guide", "L", "str"),
    # The prompt.
    Option("truncate_prompt_tokens", "V", "int"),
    Option("add_special_tokens", "V", "bool"),
    Option("add_generation_prompt", "V", "bool"),
    Option("continue_final_message", "V", "bool"),
    Option("chat_template_kwargs", "V", "object"),
    Option("reasoning_effort", "V O", "str"),
    # What comes back.
    Option("stream", "V L", "bool"),
    Option("logprobs", "V", "int"),
    Option("prompt_logprobs", "V", "int"),
    Option(
        "return_logprobs",
        "V, L, V",
        "bool",
        ("return_log_probs", "return_cumulative_logprob"),
    ),
    Option("return_token_ids", "V", "bool"),
    Option("return_perf_metrics", "L", "bool"),
    Option("exclude_input_in_output", "V L", "bool"),
    Option("echo", "V O", "bool"),
    Option("skip_special_tokens", "V", "bool"),
    # How it is done.
    Option("drafter", "T", "str"),
    Option("num_speculative_tokens", "V, L", "int", ("num_draft_tokens",)),
    Option("cache_salt", "V", "str"),
    Option("request_id", "V, S", "str", ("rid",)),
)

_ASKING_FOR_NOTHING = (
    _nothing("use_beam_search", "V", "bool", False, cure="there is no beam search"),
    _nothing("beam_width", "L", "int", 1, cure="there is no beam search"),
    _nothing("best_of", "V L", "int", 1, cure="ask for n sequences, and choose among them"),
    _nothing("detokenize", "V", "bool", True, cure="text always comes; see return_token_ids"),
    _nothing("suffix", "O", "str", "", cure="text can't be filled in before it"),
    _nothing("modalities", "O", "texts", ("text",), (), cure="there is only text"),
    _nothing("audio", "O", "object", {}, cure="there is only text"),
    _nothing("web_search_options", "O", "object", cure="there is no search"),
    _nothing("use_raw_prompt", "N", "bool", False, cure="send prompt to /v1/completions"),
    _nothing("chat_template", "V", "str", "", cure="the model's own is used"),
    _nothing("documents", "V", "objects", (), cure="write them into the messages"),
    _nothing("mm_processor_kwargs", "V", "object", {}, cure="there is only text"),
    _nothing("logits_processors", "V", "objects", (), cure="there are none"),
    _nothing("custom_logit_processor", "S", "str", "", cure="there are none"),
    _nothing("stop_regex", "S", "texts", (), cure="use stop, or guided_regex"),
    _nothing("no_repeat_ngram_size", "L S", "int", 0, cure="use repetition_penalty"),
    _nothing("lora_name", "V", "str", "", cure="there are no adapters"),
    _nothing("lora_path", "S", "str", "", cure="there are no adapters"),
    _nothing("lora_task_id", "L", "int", 0, cure="there are no adapters"),
    _nothing("return_context_logits", "L", "bool", False, cure="use logprobs"),
    _nothing("return_generation_logits", "L", "bool", False, cure="use logprobs"),
    _nothing("return_hidden_states", "S", "bool", False, cure="they aren't kept"),
    _nothing("return_tokens_as_token_ids", "V", "bool", False, cure="use return_token_ids"),
    _nothing("use_draft_logits", "L", "bool", False, cure="drafts are made here"),
)

_IGNORED = tuple(
    Option(name, whose, fate=Fate.IGNORED)
    for whose, names in {
        "V": (
            "early_stopping",
            "guided_decoding_backend",
            "length_penalty",
            "priority",
            "return_finish_reason",
            "return_num_input_tokens",
            "return_num_output_tokens",
            "spaces_between_special_tokens",
        ),
        "L": ("beam_search_diversity_rate", "pad_id"),
        "N": (
            "agent_hints",
            "annotations",
            "backend_instance_id",
            "cache_control",
            "extra_fields",
        ),
        "O": (
            "metadata",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "stream_options",
            "user",
            "verbosity",
        ),
    }.items()
    for name in names
)

OPTIONS: dict[str, Option] = {
    option.name: option for option in (*_HONOURED, *_ASKING_FOR_NOTHING, *_IGNORED)
}
# Every name -> the canonical one.
ALIASES: dict[str, str] = {
    name: option.name for option in OPTIONS.values() for name in option.names
}
NAMES = tuple(ALIASES)
