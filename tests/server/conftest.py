"""A real Triton server with a tiny verifier, and the same engine in this process as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from repositories import MAX_MODEL_LEN, SETTINGS, write_repository
from tandem import Engine, EngineConfig
from tandem.cpu.kernels.build import operator_library
from tandem_fleet.local import Pod
from tandem_runtime.server import TritonServer
from tiny_models import save_verifier

CHAT_TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool.name }}{% endfor %}{% endif %}"
    "{% if mood %}mood: {{ mood }}{% endif %}"
    "{% if reasoning_effort %}effort: {{ reasoning_effort }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('no such role: ' + message.role) }}{% endif %}"
    "<turn>{{ message.role }}:{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the server; the hook is called with every test there is."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def tiny_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for texts that take seconds to write."""
    path = save_verifier("llama", tmp_path_factory.mktemp("verifier"))
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = MAX_MODEL_LEN
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_verifier: Path) -> Path:
    """`tandem`; `short_queue`, where four requests may wait; and `vllm_format`.

    The last takes tensors without a batch dimension. The last two have a chat template.
    """
    directory = tmp_path_factory.mktemp("repository")
    chat = tmp_path_factory.mktemp("chat") / "verifier"
    shutil.copytree(tiny_verifier, chat)
    (chat / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # As in many checkpoints, it doesn't name the end of a turn.
    generation = json.loads((chat / "generation_config.json").read_text())
    (chat / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 1}))
    write_repository(directory, tiny_verifier)
    write_repository(directory, chat, "short_queue", max_queue_size=4)
    return write_repository(directory, chat, "vllm_format", max_batch_size=0)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    """A server that all tests share, with as many threads as it takes by itself."""
    operator_library()  # once, and not by three models at a time
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("OMP_NUM_THREADS")
            server = stack.enter_context(TritonServer(repository))
        yield server


@pytest.fixture(scope="session")
def engine(tiny_verifier: Path) -> Engine:
    """What the server's engine must agree with."""
    return Engine(EngineConfig(verifier=str(tiny_verifier), **SETTINGS))


@pytest.fixture(scope="session")
def make_pod(tiny_verifier: Path) -> Callable[..., Pod]:
    """Makes pods with the tiny verifier; whoever makes one stops it."""

    def make(directory: Path, extra_args: Items[str] = (), **settings: Any) -> Pod:
        repository = write_repository(directory / "repository", tiny_verifier, **settings)
        config = repository / "tandem/config.pbtxt"
        # The shortened drain; the deployed one comes in its place.
        config.write_text(config.read_text().partition('\nparameters { key: "drain_seconds"')[0])
        return Pod(repository, extra_args=extra_args)

    return make


@pytest.fixture
def private_repository(tmp_path: Path, tiny_verifier: Path) -> Iterator[Path]:
    """A repository for a test that starts a server of its own."""
    directory = write_repository(tmp_path / "repository", tiny_verifier)
    yield directory
    shutil.rmtree(directory)
