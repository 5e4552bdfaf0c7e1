"""The default model as tests load it: with the same settings it is compiled and measured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem_fleet.measure import copy_model

SMALL: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 256}


def write_default_model(repository: Path) -> Path:
    """A repository with the default model."""
    copy_model(repository)
    path = repository / "tandem/1/model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SMALL}))
    return repository
