"""Questions to the model that ask for no text: what it is, and how it tokenizes.

The request parameter `tandem_query` names the question. Its answer is one response, the last, whose
`text_output` is JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from tandem import Engine, InvalidRequestError, TandemError
from tandem.errors import refusing, shorten
from tandem.requests.options import PromptOptions, parse_json
from tandem_options.values import convert
from tandem_triton.choice import output_tensor
from tandem_triton.inputs import read_ids, read_prompt, read_tensor
from tandem_triton.request import MAX_MESSAGE, request_parameters

logger = logging.getLogger("tandem")

_PARAMETER = "tandem_query"
_OPTIONS = (
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "reasoning_effort",
    "return_token_strs",
    "skip_special_tokens",
)
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def is_query(request: Any) -> bool:
    """Whether a request is one; what can't be read is not, and is refused as a request."""
    try:
        text = request.parameters() or ""
        return _PARAMETER in text and _PARAMETER in json.loads(text)
    except ValueError:
        return False


class Query:
    """One question, and where its answer goes."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._done = False

    def answer(self, request: Any, engine: Engine) -> None:
        """Answers it.

        Raises:
            InvalidRequestError: naming the input or parameter.
        """
        parameters = request_parameters(request)
        name = parameters.pop(_PARAMETER)
        find = _ANSWERS.get(name) if isinstance(name, str) else None
        if find is None:
            raise InvalidRequestError(
                f"{_PARAMETER} must be one of {', '.join(_ANSWERS)}, got {shorten(name)}"
            )
        answer = json.dumps(find(request, _Options(request, parameters), engine))
        tensor = output_tensor("text_output", [answer])
        self._send(pb_utils.InferenceResponse(output_tensors=[tensor]))

    def fail(self, error: TandemError) -> None:
        """Answers with an error."""
        code = getattr(pb_utils.TritonError, error.code)
        triton_error = pb_utils.TritonError(f"{error.code}: {str(error)[:MAX_MESSAGE]}", code)
        self._send(pb_utils.InferenceResponse(error=triton_error))

    def _send(self, response: Any) -> None:
        if not self._done:
            self._done = True
            self._sender.send(response, _FINAL)


class _Options:
    """A question's options; `sampling_parameters` wins over request parameters.

    Raises:
        InvalidRequestError: naming one that no question has.
    """

    def __init__(self, request: Any, parameters: dict[str, Any]) -> None:
        self._given = parameters
        for tensor in request.inputs():
            if tensor.name() == "sampling_parameters":
                text = read_tensor(tensor)
                self._given |= parse_json("sampling_parameters", text) if text else {}
        for name in self._given:
            if name not in _OPTIONS:
                raise InvalidRequestError(
                    f"unknown parameter {shorten(name)}; a {_PARAMETER} has {', '.join(_OPTIONS)}"
                )

    def flag(self, name: str) -> bool | None:
        value = self._given.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise InvalidRequestError(f"{name} must be true or false, got {shorten(value)}")

    def prompt(self) -> PromptOptions:
        """How a prompt becomes tokens, as in a request."""
        with refusing():
            effort, told = (
                None if self._given.get(name) is None else convert(name, self._given[name], kind)
                for name, kind in (("reasoning_effort", "str"), ("chat_template_kwargs", "object"))
            )
        return PromptOptions(
            add_special_tokens=self.flag("add_special_tokens"),
            add_generation_prompt=self.flag("add_generation_prompt"),
            continue_final_message=self.flag("continue_final_message") or False,
            chat_template_kwargs=told or {},
            reasoning_effort=effort,
        )


def _describe(_: Any, options: _Options, engine: Engine) -> dict[str, Any]:
    tokenizer, config = engine.tokenizer, engine.config
    assert tokenizer is not None
    template = tokenizer.chat_template
    eos_token_ids = sorted(engine.eos_token_ids)
    return {
        # Of several, the one that conversations without tools are written by.
        "chat_template": template.get("default") if isinstance(template, dict) else template,
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.verifier.model.config.get_text_config().vocab_size,
        "dtype": str(engine.verifier.model.dtype).removeprefix("torch."),
        "eos_token_ids": eos_token_ids,
        "eos_tokens": tokenizer.convert_ids_to_tokens(eos_token_ids),
        "drafters": config.max_lookaheads,
        "default_drafter": config.drafter_name,
    }


def _tokenize(request: Any, options: _Options, engine: Engine) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    prompt, is_chat = read_prompt(request, tokenizer, engine.text_limits, options.prompt())
    if isinstance(prompt, str):
        engine.text_limits.check_text("text_input", prompt)
        token_ids: list[int] = list(tokenizer(prompt)["input_ids"])
    else:
        token_ids = prompt
        engine.check_token_ids("input_ids", token_ids)
        if options.flag("add_special_tokens") and not is_chat:
            raise InvalidRequestError("add_special_tokens: true is for text, not for input_ids")
    answer: dict[str, Any] = {"token_ids": token_ids}
    if options.flag("return_token_strs"):
        answer["token_strs"] = tokenizer.convert_ids_to_tokens(token_ids)
    return answer


def _detokenize(request: Any, options: _Options, engine: Engine) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    tensors = {tensor.name(): tensor for tensor in request.inputs()}
    if "input_ids" not in tensors:
        raise InvalidRequestError("detokenize needs input_ids")
    token_ids = read_ids(tensors["input_ids"])
    engine.text_limits.check_count("input_ids", len(token_ids))
    engine.check_token_ids("input_ids", token_ids)
    special = options.flag("skip_special_tokens") or False
    return {"text": tokenizer.decode(token_ids, skip_special_tokens=special)}


_ANSWERS: dict[str, Callable[[Any, _Options, Engine], dict[str, Any]]] = {
    "describe": _describe,
    "tokenize": _tokenize,
    "detokenize": _detokenize,
}
