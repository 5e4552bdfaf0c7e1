"""Engines of both wings, in files that are marked so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cuda_wing import QuickWing, cuda_wing
from tiny_engines import Engines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("both_wings") and "wing" in metafunc.fixturenames:
        metafunc.parametrize("wing", ["cpu", "cuda"])


@pytest.fixture
def wing() -> str:
    return "cpu"


@pytest.fixture
def engines(wing: str, engines: Engines, cuda_engines: Engines) -> Iterator[Engines]:
    """Where there is a GPU, all are on it anyway."""
    if wing == "cpu":
        yield engines
    elif torch.cuda.is_available():
        pytest.skip("the other has the GPU")
    else:
        with cuda_wing(QuickWing):
            yield cuda_engines
