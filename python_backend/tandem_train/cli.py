"""Trains a drafter for a verifier and measures it.

Three stages, each of which can be run alone and goes on where it was interrupted:
  generate  text from the verifier itself, in DIRECTORY/corpus
  train     a drafter on that text, in DIRECTORY/drafter
  evaluate  the drafter against plain decoding on held-out prompts, in DIRECTORY/evaluation.json
  all       the three in turn
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from tandem.errors import TandemError
from tandem_train.corpus import Corpus
from tandem_train.evaluate import Prompt, evaluate, read_prompts, table
from tandem_train.generate import add_texts, generate
from tandem_train.train import TrainingConfig, train

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT_PROMPTS = ROOT / "prompts" / "held_out.jsonl"
_EXAMPLES = """examples:
  python scripts/train_drafter.py all .models/gemma-3-270m .training/gemma
  python scripts/train_drafter.py generate meta-llama/Llama-3.2-1B .training/llama \\
      --num-sequences 20000 --text notes.txt manual.md
  python scripts/train_drafter.py train meta-llama/Llama-3.2-1B .training/llama --epochs 6
  python scripts/train_drafter.py train .models/gemma-3-270m .training/mine \
      --start-from drafters/gemma-3-270m --learning-rate 2e-4
  python scripts/train_drafter.py evaluate meta-llama/Llama-3.2-1B .training/llama -k 3

A finished drafter goes into model.json as
  "drafters": {"mtp": {"model": "DIRECTORY/drafter", "num_speculative_tokens": 4}}
"""


def main() -> int:
    """Runs the stages asked for and returns the exit status."""
    # SIGTERM acts as Ctrl-C does, and so does SIGINT where a shell's background job ignores it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()
    stages = {"generate": run_generate, "train": run_train, "evaluate": run_evaluate}
    chosen = list(stages) if arguments.stage == "all" else [arguments.stage]
    try:
        for stage in chosen:
            stages[stage](arguments)
    except (TandemError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["generate", "train", "evaluate", "all"])
    parser.add_argument("verifier", help="directory or hub id of the verifier")
    parser.add_argument("directory", type=Path, help="where everything is kept, DIRECTORY above")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--dtype", default="auto", help="of the verifier; as in model.json")
    parser.add_argument("--device", default="auto", help="as in model.json")

    stage = parser.add_argument_group("generate")
    stage.add_argument(
        "--num-sequences", type=positive, default=4000, help="texts to write (default 4000)"
    )
    stage.add_argument(
        "--sequence-length", type=positive, default=192, help="tokens of a text (default 192)"
    )
    stage.add_argument(
        "--prompts", type=Path, help="openings, one a line, in place of the built-in ones"
    )
    stage.add_argument(
        "--text", type=Path, nargs="+", default=[], help="text files of yours to train on as well"
    )

    stage = parser.add_argument_group("train")
    defaults = TrainingConfig()
    stage.add_argument(
        "--start-from",
        metavar="DRAFTER",
        help="a trained drafter to train further, whose layers and vocabulary stay as they are",
    )
    stage.add_argument(
        "--source-layers",
        type=int,
        nargs="+",
        help="the verifier's layers to copy and to read K/V of (default: its last of each type)",
    )
    for name, meaning in (
        ("draft_vocab_size", "most frequent tokens that can be guessed"),
        ("num_steps", "tokens ahead that are trained"),
        ("epochs", "passes over the texts"),
        ("batch_size", "texts in one update"),
    ):
        default = getattr(defaults, name)
        stage.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive,
            default=default,
            help=f"{meaning} (default {default})",
        )
    stage.add_argument(
        "--learning-rate",
        type=float,
        default=defaults.learning_rate,
        help=f"at its highest (default {defaults.learning_rate})",
    )

    stage = parser.add_argument_group("evaluate")
    stage.add_argument(
        "-k",
        "--num-speculative-tokens",
        type=positive,
        default=4,
        help="draft tokens a round (default 4)",
    )
    stage.add_argument(
        "--max-tokens", type=positive, default=128, help="tokens of an answer (default 128)"
    )
    stage.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="default: 0 1"
    )
    stage.add_argument(
        "--held-out-prompts",
        type=Path,
        default=HELD_OUT_PROMPTS,
        help='lines such as {"kind": "prose", "prompt": "..."} (default: 40 in prompts/)',
    )
    stage.add_argument("--drafter", type=Path, help="another one than DIRECTORY/drafter")
    return parser.parse_args()


def positive(value: str) -> int:
    """A whole number from 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return number


def run_generate(arguments: argparse.Namespace) -> None:
    """Stage 1."""
    prompts = arguments.prompts.read_text("utf-8").splitlines() if arguments.prompts else []
    corpus = Corpus(arguments.directory / "corpus")
    generate(
        arguments.verifier,
        corpus,
        num_sequences=arguments.num_sequences,
        sequence_length=arguments.sequence_length,
        seed=arguments.seed,
        prompts=[prompt for prompt in prompts if prompt.strip()],
        dtype=arguments.dtype,
        device=arguments.device,
    )
    add_texts(arguments.verifier, corpus, arguments.text, arguments.sequence_length)


def run_train(arguments: argparse.Namespace) -> None:
    """Stage 2."""
    texts = [text for text in Corpus(arguments.directory / "corpus") if len(text.token_ids) > 1]
    config = TrainingConfig(
        start_from=arguments.start_from,
        source_layers=arguments.source_layers or [],
        draft_vocab_size=arguments.draft_vocab_size,
        num_steps=arguments.num_steps,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    train(
        arguments.verifier,
        texts,
        config,
        arguments.directory,
        dtype=arguments.dtype,
        device=arguments.device,
    )


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Stage 3."""
    drafter = arguments.drafter or arguments.directory / "drafter"
    prompts: list[Prompt] = read_prompts(arguments.held_out_prompts)
    report = evaluate(
        arguments.verifier,
        {
            "type": "mtp",
            "model": str(drafter),
            "num_speculative_tokens": arguments.num_speculative_tokens,
        },
        prompts,
        max_tokens=arguments.max_tokens,
        temperatures=arguments.temperatures,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    print(table(report))
    path = arguments.directory / "evaluation.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
