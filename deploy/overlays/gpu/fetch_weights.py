"""Downloads the models that model.json names from the hub, once for all pods and restarts.

Run by an init container with `HF_HOME` on the shared volume. The server then runs offline.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from huggingface_hub import snapshot_download

MODEL_JSON = Path("/models/tandem/1/model.json")


def main() -> None:
    """Downloads each model that isn't complete; one pod at a time."""
    home = Path(os.environ["HF_HOME"])
    config = json.loads(MODEL_JSON.read_text(encoding="utf-8"))
    drafters = [d["model"] for d in config["drafters"].values() if "model" in d]
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for model in (config["verifier"], *drafters):
            complete = home / f"{model.replace('/', '--')}.complete"
            if not complete.exists():
                print(f"downloading {model}", flush=True)
                snapshot_download(model)
                complete.touch()


if __name__ == "__main__":
    main()
