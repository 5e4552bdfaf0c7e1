"""The server's process and what its log says, without starting one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem_runtime.server import ServerError, TritonServer, failure_reason


def test_picked_ports_differ() -> None:
    server = TritonServer("repository")
    assert len({server.http_port, server.grpc_port, server.metrics_port}) == 3
    assert server.grpc_url == f"127.0.0.1:{server.grpc_port}"


def test_stopping_a_server_that_was_not_started_does_nothing() -> None:
    server = TritonServer("repository")
    server.stop()
    assert not server.is_running()


def test_a_model_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").touch()
    with pytest.raises(ServerError, match=r"no model 'c' in .*: it has a, b$"):
        TritonServer(tmp_path, models=["a", "c"])
    with pytest.raises(ServerError, match="it has none"):
        TritonServer(tmp_path / "a", models=["b"])


def test_failure_reason_is_what_the_model_raised() -> None:
    log = (
        "E1124 14:44:35 75 model_lifecycle.cc:642] \"failed to load 'tandem' version 1: Internal: "
        "TritonModelException: unknown key 'foo'\\n\\nAt:\\n  model.py(297): initialize\\n\"\n"
        "I1124 14:44:35.5 75 model_lifecycle.cc:777] \"failed to load 'tandem'\"\n"
        "error: creating server: Internal - failed to load all models\n"
    )
    assert failure_reason(log) == (
        "failed to load 'tandem' version 1: Internal: TritonModelException: unknown key 'foo'"
    )


def test_failure_reason_of_a_bad_configuration_is_the_place_in_it() -> None:
    log = (
        "[libprotobuf ERROR text_format.cc:337] Error parsing text-format ModelConfig: 39:9: foo\n"
        "E1124 14:44:36 75 manager.cc:1460] \"Poll failed for model directory 'tandem': failed to "
        'read text proto"\nerror: creating server: Internal - failed to load all models\n'
    )
    assert failure_reason(log) == (
        "Error parsing text-format ModelConfig: 39:9: foo\n"
        "Poll failed for model directory 'tandem': failed to read text proto"
    )


def test_failure_reason_is_the_servers_own_without_a_better_one() -> None:
    log = (
        'E1124 14:44:37.6 75 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        "error: creating server: Internal - failed to stat file repository\n"
    )
    assert failure_reason(log) == "creating server: Internal - failed to stat file repository"
    assert failure_reason('I1124 14:45:27.1 76 model_lifecycle.cc:472] "loading: tandem:1"\n') == ""
