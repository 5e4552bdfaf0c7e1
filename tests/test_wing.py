"""One place chooses the wing, and both wings promise the same."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem import ConfigError
from tandem.cpu.wing import CPUWing
from tandem.cuda.wing import CUDAWing
from tandem.wing import device_of, wing_of


def promises(wing: type) -> dict[str, list[str]]:
    """The public names of a wing; of methods, those of their parameters too."""
    return {
        name: list(inspect.signature(value).parameters) if inspect.isfunction(value) else []
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


def test_a_gpu_is_one_of_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda") == torch.device("cuda")
    assert device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device 'cuda:2': this machine has 2 CUDA devices"):
        device_of("cuda:2")
    # Which torch takes for cuda:0.
    with pytest.raises(ConfigError, match="device 'cuda:256'"):
        device_of("cuda:256")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_without_a_gpu_there_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=f"device '{name}': this machine has 0 CUDA devices"):
        device_of(name)


@given(st.text() | st.from_regex(r"(cpu|cuda|meta|xpu|auto):?-?[0-9]*"))
def test_any_name_is_a_device_or_refused_in_one_line(name: str) -> None:
    said = ""
    try:
        device_of(name)
    except ConfigError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert len(said) < 200


@pytest.mark.parametrize(
    ("name", "message"),
    [("tpu!", "'tpu!' is not a torch device"), ("meta", "'meta': Tandem computes on cpu or cuda")],
)
def test_another_device_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        device_of(name)
