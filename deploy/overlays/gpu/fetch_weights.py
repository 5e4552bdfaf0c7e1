"""Downloads the models that model.json names from the hub, or waits until another has (`--wait`).

The job runs it with `HF_HOME` on the volume that pods share. They wait for it, without a network
or a token, before their servers start offline.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

MODEL_JSON = Path("/models/tandem/1/model.json")


def main() -> None:
    """Downloads each model that isn't complete, or waits for it."""
    home = Path(os.environ["HF_HOME"])
    config = json.loads(MODEL_JSON.read_text(encoding="utf-8"))
    drafters = [d["model"] for d in config["drafters"].values() if "model" in d]
    for model in (config["verifier"], *drafters):
        complete = home / f"{model.replace('/', '--')}.complete"
        if sys.argv[1:] == ["--wait"]:
            wait_for(complete)
        elif not complete.exists():
            download(model)
            complete.touch()


def wait_for(complete: Path) -> None:
    """Returns when the file is there."""
    if not complete.exists():
        print(f"waiting for {complete}, which the job tandem-weights makes", flush=True)
    while not complete.exists():
        time.sleep(2)


def download(model: str) -> None:
    """All files of the model, into `HF_HOME`."""
    # Whoever waits needs no library for it.
    from huggingface_hub import snapshot_download

    print(f"downloading {model}", flush=True)
    snapshot_download(model)


if __name__ == "__main__":
    main()
