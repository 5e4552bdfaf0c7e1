"""Whatever stands in model.json, one line says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem import ConfigError, DrafterConfig, EngineConfig

NGRAM: dict[str, Any] = {"ngram": {}}
# What somebody could write, and what nobody would.
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=200)
    | st.sampled_from(["", "cpu", "cuda", "none", "ngram", "mtp", "a+b", 10**9, 10**40, 0, -1]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def objects_of(cls: type, **known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with a class's fields, of which some may be as they should."""
    names = [field.name for field in dataclasses.fields(cls)]
    fields = {name: JUNK | known[name] if name in known else JUNK for name in names}
    return st.fixed_dictionaries({}, optional=fields) | st.dictionaries(st.text(), JUNK)


DRAFTER = objects_of(DrafterConfig, type=st.sampled_from(["ngram", "mtp"]), name=st.nothing())
CONFIG = objects_of(
    EngineConfig,
    verifier=st.just("model"),
    drafters=st.dictionaries(st.text() | st.sampled_from(["ngram", "mtp"]), DRAFTER | JUNK),
    drafter_weights=st.dictionaries(st.sampled_from(["none", "ngram"]), JUNK),
)


def read(path: Path) -> None:
    """Either all of it is of use, or one line says what isn't."""
    try:
        config = EngineConfig.from_json(path)
    except ConfigError as error:
        said = str(error)
    else:
        json.dumps(dataclasses.asdict(config))
        assert config.drafter_name in config.max_lookaheads
        return
    # The list of what is allowed is the longest part.
    assert said.isprintable()
    assert len(said) < 1000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("junk") / "model.json"


@settings(max_examples=300)
@given(values=CONFIG | JUNK)
@pytest.mark.slow
def test_junk_is_refused_in_one_line(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))
    read(path)


@settings(max_examples=200)
@given(text=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_are_refused_in_one_line(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    read(path)


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=lambda field: field.name)
@settings(max_examples=30)
@given(value=JUNK)
def test_one_value_is_junk(path: Path, field: dataclasses.Field[Any], value: object) -> None:
    path.write_text(json.dumps({"verifier": "model", "drafters": NGRAM, field.name: value}))
    read(path)


@pytest.mark.parametrize("field", dataclasses.fields(DrafterConfig), ids=lambda field: field.name)
@settings(max_examples=30)
@given(value=JUNK)
def test_one_value_of_a_drafter_is_junk(
    path: Path, field: dataclasses.Field[Any], value: object
) -> None:
    drafters = {"first": {"type": "ngram", field.name: value}}
    path.write_text(json.dumps({"verifier": "model", "drafters": drafters}))
    read(path)
