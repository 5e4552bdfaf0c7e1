"""Model repositories with a tiny verifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem_runtime.paths import ROOT

MAX_MODEL_LEN = 16000
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "drafters": {"ngram": {"num_speculative_tokens": 4, "min_ngram_size": 1}},
    "max_num_seqs": 8,
    "max_model_len": MAX_MODEL_LEN,
    "lookahead": "fixed",
    "enforce_eager": True,
}


def write_repository(
    directory: Path,
    verifier: Path,
    name: str = "tandem",
    max_queue_size: int | str = 128,
    max_batch_size: int = 8,
    **settings: Any,
) -> Path:
    """Adds a model to a repository: the published configuration, with a tiny verifier."""
    version = directory / name / "1"
    version.mkdir(parents=True)
    config = (ROOT / "model_repository/tandem/config.pbtxt").read_text()
    config = config.replace('string_value: "128"', f'string_value: "{max_queue_size}"')
    config = config.replace("max_batch_size: 8", f"max_batch_size: {max_batch_size}")
    # Triton's own parameter, shortened so that the test of it needn't wait.
    config += '\nparameters { key: "drain_seconds" value { string_value: "1" } }\n'
    (version.parent / "config.pbtxt").write_text(config)
    model = {"verifier": str(verifier), **SETTINGS, **settings}
    (version / "model.json").write_text(json.dumps(model))
    return directory
