"""Requests as the tensors that config.pbtxt declares, and what the engine itself answers."""

from __future__ import annotations

import queue
import re
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from stream import TIMEOUT
from tandem import Engine, SamplingParams
from tandem_runtime.paths import ROOT
from tandem_runtime.server import TritonServer

PROMPT = "one two three"
COMMON: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "seed": 5}


def tensors(values: dict[str, Any], *, batch: bool = True) -> list[Any]:
    """Values as the tensors that the model's configuration declares, `[1, n]` or `[n]`."""
    made = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(items[0], str):
            items = [item.encode() for item in items]
        array = np.array(items, dtype=KINDS[name])
        array = array[np.newaxis] if batch else array
        tensor = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def declared(section: str) -> dict[str, Any]:
    """Name -> numpy type of the inputs or outputs in config.pbtxt."""
    text = (ROOT / "model_repository/tandem/config.pbtxt").read_text()
    block = re.search(rf"^{section} \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    found = re.findall(r'name: "(\w+)", data_type: TYPE_(\w+)', block[1])
    return {name: triton_to_np_dtype("BYTES" if kind == "STRING" else kind) for name, kind in found}


KINDS = declared("input")


def ask(server: TritonServer, model: str = "tandem", **values: Any) -> list[dict[str, Any]]:
    """All responses to a request of tensors, each as name -> list of values."""
    answers: queue.Queue[Any] = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        values = {"text_input": PROMPT, **values} if "text_input" not in values else values
        values = {name: value for name, value in values.items() if value is not None}
        batch = model != "vllm_format"
        client.async_stream_infer(
            model, tensors(values, batch=batch), enable_empty_final_response=True
        )
        responses = []
        while True:
            answer = answers.get(timeout=TIMEOUT)
            if isinstance(answer, InferenceServerException):
                raise answer
            message = answer.get_response()
            if message.outputs:
                names = [output.name for output in message.outputs]
                responses.append({name: answer.as_numpy(name).tolist() for name in names})
            if message.parameters["triton_final_response"].bool_param:
                return responses


def text_of(responses: list[dict[str, Any]]) -> str:
    return b"".join(response["text_output"][0] for response in responses).decode()


def offline(engine: Engine, prompt: str | list[int] = PROMPT, **options: Any) -> str:
    params = SamplingParams(**{**COMMON, **options})
    output = next(engine.generate([prompt], params, drafter="none"))
    assert output.text is not None
    return output.text
