"""lm-eval: a multiple choice and a perplexity by local-completions."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from where import MODEL, OPENAI_URL

HERE = Path(__file__).parent
with tempfile.TemporaryDirectory() as scratch:
    arguments = {
        "model": MODEL,
        "base_url": f"{OPENAI_URL}/completions",
        "tokenizer": os.environ["TOKENIZER"],
        "num_concurrent": 4,
        "max_retries": 1,
    }
    said = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", said, "--include_path", str(HERE / "lm_eval_tasks")]
    command += ["--tasks", "tandem_choice,tandem_prose", "--output_path", scratch]
    subprocess.run(command, cwd=HERE / "lm_eval_tasks", check=True, stdout=subprocess.DEVNULL)
    (path,) = Path(scratch).rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
choice, prose = results["tandem_choice"], results["tandem_prose"]
assert prose["word_perplexity,none"] > 2, prose
print(
    f"multiple choice: accuracy {choice['acc,none']:.3f}; "
    f"perplexity of words {prose['word_perplexity,none']:.3f}"
)
