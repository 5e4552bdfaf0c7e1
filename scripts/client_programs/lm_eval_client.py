"""lm-eval: a multiple choice and a perplexity by local-completions, against transformers' own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from where import MODEL, OPENAI_URL

TASKS = Path(__file__).parent / "lm_eval_tasks"
VERIFIER = os.environ["VERIFIER"]
TOLERANCE = 1e-3
ARGUMENTS = {
    "local-completions": {
        "model": MODEL,
        "base_url": f"{OPENAI_URL}/completions",
        "tokenizer": VERIFIER,
        "num_concurrent": 4,
        "max_retries": 1,
        # As its `hf` does with Gemma.
        "add_bos_token": True,
    },
    "hf": {"pretrained": VERIFIER, "dtype": "float32"},
}


def evaluate(model: str) -> tuple[dict, dict]:
    """Results of the tasks, and the likelihood of each text that they ask for."""
    said = ",".join(f"{name}={value}" for name, value in ARGUMENTS[model].items())
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", said]
        command += ["--include_path", str(TASKS), "--tasks", "tandem_choice,tandem_prose"]
        command += ["--output_path", scratch, "--log_samples"]
        subprocess.run(command, cwd=TASKS, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(scratch).rglob("results_*.json")
        results = json.loads(path.read_text())["results"]
        likelihoods = {}
        for path in Path(scratch).rglob("samples_*.jsonl"):
            for sample in map(json.loads, path.read_text().splitlines()):
                for number, answers in enumerate(sample["resps"]):
                    # A likelihood, perhaps with whether it is the likeliest text.
                    found = answers[0][0] if isinstance(answers[0], list) else answers[0]
                    key = (path.name.rpartition("_")[0], sample["doc_id"], number)
                    likelihoods[key] = float(found)
    return results, likelihoods


results, likelihoods = evaluate("local-completions")
own_results, own = evaluate("hf")
assert likelihoods.keys() == own.keys(), (len(likelihoods), len(own))
assert len(own) > 70, len(own)
farthest = max(abs(likelihoods[key] - own[key]) for key in own)
assert farthest < TOLERANCE, (farthest, likelihoods, own)
for task, metric in (("tandem_choice", "acc,none"), ("tandem_prose", "word_perplexity,none")):
    found, expected = results[task][metric], own_results[task][metric]
    assert abs(found - expected) < TOLERANCE, (task, found, expected)
right = results["tandem_choice"]["acc,none"]
perplexity = results["tandem_prose"]["word_perplexity,none"]
print(
    f"multiple choice ({right:.3f} right), perplexity of words ({perplexity:.3f}): as its `hf` has "
    f"them; each of {len(own)} likelihoods to {farthest:.0e}"
)
