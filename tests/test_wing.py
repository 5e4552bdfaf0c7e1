"""One place chooses the wing, and both wings promise the same."""

from __future__ import annotations

import inspect

import pytest
import torch

from tandem import ConfigError
from tandem.cpu.wing import CPUWing
from tandem.cuda.wing import CUDAWing
from tandem.wing import device_of, wing_of


def promises(wing: type) -> dict[str, list[str]]:
    """The public names of a wing; of methods, those of their parameters too."""
    return {
        name: list(inspect.signature(value).parameters) if callable(value) else []
        for name, value in vars(wing).items()
        if not name.startswith("_")
    }


def test_both_wings_promise_the_same() -> None:
    assert promises(CPUWing) == promises(CUDAWing)


def test_each_device_has_its_wing() -> None:
    assert isinstance(wing_of(torch.device("cpu")), CPUWing)
    assert isinstance(wing_of(torch.device("cuda", 1)), CUDAWing)


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_of("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [("tpu!", "'tpu!' is not a torch device"), ("meta", "'meta': Tandem computes on cpu or cuda")],
)
def test_another_device_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        device_of(name)
