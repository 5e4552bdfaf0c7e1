"""tritonclient: HTTP and gRPC, whole and streamed, and what the server says of itself."""

import queue

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from where import MODEL, PROMPT, TEXT, TRITON_GRPC, TRITON_HTTP

http = triton_http.InferenceServerClient(TRITON_HTTP)
assert http.is_server_ready() and http.is_model_ready(MODEL)
assert http.get_model_metadata(MODEL)["name"] == MODEL
client = triton_grpc.InferenceServerClient(TRITON_GRPC)
for streams in (False, True):
    inputs = []
    for name, value, kind in (
        ("text_input", np.array([[PROMPT.encode()]], dtype=object), "BYTES"),
        ("stream", np.array([[streams]]), "BOOL"),
        ("max_tokens", np.array([[10]], dtype=np.int32), "INT32"),
        ("temperature", np.array([[0]], dtype=np.float32), "FP32"),
    ):
        inputs.append(triton_grpc.InferInput(name, value.shape, kind))
        inputs[-1].set_data_from_numpy(value)
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error, put=answers.put: put((result, error)))
    client.async_stream_infer(MODEL, inputs, enable_empty_final_response=True)
    text, is_final = "", False
    while not is_final:
        result, error = answers.get(timeout=60)
        assert error is None, error
        response = result.get_response()
        is_final = response.parameters["triton_final_response"].bool_param
        if response.outputs:
            text += result.as_numpy("text_output")[0].decode()
    client.stop_stream()
    assert text == TEXT, text
print("gRPC, whole and streamed; health and metadata over HTTP")
