"""Tiny models, saved once a session, and engines whose cache is recounted after each test."""

from __future__ import annotations

import os
from pathlib import Path

# Tiny products gain nothing from a second thread, here and in what tests start; where several such
# processes share a few cores, threads that wait for one another would take most of the time.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU, kernels in the Triton language run in its interpreter; it asks when it is imported.
os.environ.setdefault("TRITON_INTERPRET", str(int(not Path("/dev/nvidiactl").exists())))

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from transformers.utils import logging

from tandem import Engine, EngineConfig
from tandem_runtime import tools
from tiny_engines import Engines, TinyModels
from tiny_models import VERIFIERS

logging.disable_progress_bar()
settings.register_profile("tandem", deadline=None, derandomize=True, database=None)
settings.load_profile("tandem")
# The check of a GPU runs tests, and is itself run by one.
_WITHIN_A_TEST = "PYTEST_CURRENT_TEST" in os.environ
# A job in a shell's background ignores SIGINT, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-tools",
        action="store_true",
        help="tests whose program is missing fail, and are not skipped",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is tried on every architecture is quick on two of them, and so with single drafters."""
    slow = set(VERIFIERS) - {"gemma-3", "gemma-4-E2B"} | {"ngram+mtp", "ngram+causal_lm"}
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in slow for value in values):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def find_tool(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """Finds a program that is no Python package; the test is skipped where it is missing."""

    def find(program: str) -> str:
        path = tools.find(program)
        if path is None:
            required = pytestconfig.getoption("--require-tools")
            (pytest.fail if required else pytest.skip)(tools.cure(program))
        return path

    return find


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs measured in tests are none of the user's."""
    if _WITHIN_A_TEST:  # that of the session around it, where the operators are compiled already
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engines(tiny: TinyModels) -> Engines:
    return Engines(tiny)


@pytest.fixture(scope="session")
def cuda_engines(tiny: TinyModels) -> Engines:
    """Engines whose rounds run on the device, with the CPU's kernels; used within `cuda_wing`."""
    return Engines(tiny)


@pytest.fixture(autouse=True)
def _no_block_in_use(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the caches of the shared engines are intact and empty."""
    used = request.getfixturevalue("engines") if "engines" in request.fixturenames else None
    yield
    if used is not None:
        used.check_idle()


@pytest.fixture
def make_engine(tiny: TinyModels) -> Iterator[Callable[..., Engine]]:
    """Makes engines on tiny verifiers; when the test is over, all their blocks must be free."""
    engines: list[Engine] = []

    def make(name: str, **settings: Any) -> Engine:
        settings = {
            "verifier": str(tiny.verifier(name)),
            "dtype": "float32",
            "max_model_len": 200,
            "kv_cache_tokens": 6400,
            "max_num_seqs": 32,
            "lookahead": "fixed",
            "enforce_eager": True,
            **settings,
        }
        engines.append(Engine(EngineConfig(**settings)))
        return engines[-1]

    yield make
    for engine in engines:
        assert not engine.has_work
        engine.check_integrity()
        assert engine.load.num_blocks_used == 0
