"""The `tandem doctor` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from tandem import Engine, EngineConfig, TandemError
from tandem.drafter_config import NO_DRAFTER
from tandem_doctor.checkup import PROMPTS, TEMPERATURES, Checkup, check
from tandem_doctor.exactness import Comparison, compare, num_answers

OK, FAILED, DIFFERENT, INTERRUPTED = 0, 1, 3, 130
DEFAULT_CONFIG = Path("model_repository/tandem/1/model.json")

_EPILOG = """examples:
  tandem doctor
  tandem doctor /models/tandem/1/model.json --drafter ngram --batch-size 8
  tandem doctor --prompts mine.txt --max-tokens 128 --json > checkup.json
  tandem doctor --exact --prompts mine.txt

PROMPTS is a text file with a prompt a line, or JSON Lines with a "prompt" in each.

exit status: 0 checked, whatever was found; 1 it could not be checked; 2 wrong usage;
3 with --exact, an answer differs; 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.disable_progress_bar()
    try:
        return _run(parsed)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except (TandemError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tandem doctor",
        description="Checks offline whether a drafter pays for its verifier, and says why not; or "
        "whether answers are the same however they are asked for.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        default=DEFAULT_CONFIG,
        help=f"the model's model.json ({DEFAULT_CONFIG})",
    )
    parser.add_argument("--drafter", metavar="NAME", help="default: all that are configured")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: eight short ones")
    parser.add_argument("--max-tokens", type=_count, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="sequences at once (1; with --exact as many as the model takes)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compare answers alone, in a batch and with each drafter, token by token",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def _run(parsed: argparse.Namespace) -> int:
    prompts = PROMPTS if parsed.prompts is None else read_prompts(parsed.prompts)
    config = dataclasses.replace(EngineConfig.from_json(parsed.config), lookahead="adaptive")
    names = [parsed.drafter] if parsed.drafter else [*config.drafter_configs]
    for name in names:
        if name == NO_DRAFTER or name not in config.max_lookaheads:
            known = ", ".join(n for n in config.max_lookaheads if n != NO_DRAFTER)
            raise ValueError(f"unknown drafter {name!r}; configured: {known or 'none'}")
    if not names and not parsed.exact:
        raise ValueError(f"{parsed.config} configures no drafter")
    log = Console(stderr=True)
    with log.status("loading the models and measuring costs"):
        engine = Engine(config)
    if parsed.exact:
        return _compare(engine, names, prompts, parsed, log)
    checkups = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, transient=True) as bar:
        for name in names:
            total = len(TEMPERATURES) * len(prompts) * parsed.max_tokens
            task = bar.add_task(name, total=total)
            checkups.append(
                check(
                    engine,
                    name,
                    prompts,
                    max_tokens=parsed.max_tokens,
                    batch_size=parsed.batch_size or 1,
                    progress=lambda count, task=task: bar.advance(task, count),  # type: ignore[misc]
                )
            )
    if parsed.json:
        print(json.dumps([checkup.to_json() for checkup in checkups], indent=2))
    else:
        for checkup in checkups:
            show(checkup, Console())
    return OK


def _compare(
    engine: Engine,
    names: Sequence[str],
    prompts: Sequence[str],
    parsed: argparse.Namespace,
    log: Console,
) -> int:
    columns = (TextColumn("comparing"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task("", total=num_answers(len(names), len(prompts), len(TEMPERATURES)))
        comparisons = compare(
            engine,
            names,
            prompts,
            temperatures=TEMPERATURES,
            max_tokens=parsed.max_tokens,
            batch_size=parsed.batch_size or engine.config.max_num_seqs,
            progress=lambda: bar.advance(task),
        )
    if parsed.json:
        print(json.dumps([dataclasses.asdict(each) for each in comparisons], indent=2))
    else:
        show_comparisons(comparisons, Console())
    return OK if all(each.same == each.answers for each in comparisons) else DIFFERENT


def read_prompts(path: Path) -> list[str]:
    """A prompt a line, as text or as JSON with a "prompt".

    Raises:
        OSError, ValueError: the file can't be read, or has no prompt.
    """
    prompts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            prompts.append(str(json.loads(line)["prompt"]))
        elif line.strip():
            prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} has no prompt")
    return prompts


def show(checkup: Checkup, console: Console) -> None:
    """Prints a checkup for people."""
    console.print(
        f"[bold]{checkup.drafter}[/]: a verifier pass takes {1e3 * checkup.verify_seconds:.1f} ms, "
        f"a guess {1e3 * checkup.guess_seconds:.2f} ms"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    sizes = list(next(iter(checkup.acceptance.values())).speedups)
    for column in ("T", "accepted by position", "length", *(f"batch {size}" for size in sizes)):
        table.add_column(column, no_wrap=True)
    for temperature, each in checkup.acceptance.items():
        chances = " ".join(f"{chance:.2f}" for chance in each.stats.chances())
        cells = [
            "plain"
            if speedup.num_speculative_tokens == 0
            else f"k={speedup.num_speculative_tokens}: {speedup.factor:.2f}x"
            for speedup in each.speedups.values()
        ]
        table.add_row(f"{temperature:g}", chances or "no guess", f"{each.mean_length:.2f}", *cells)
    console.print(table)
    for finding in checkup.findings:
        console.print(f"[yellow]{finding}[/]")
    if not checkup.findings:
        console.print("[green]Nothing is wrong.[/]")
    console.print()


def show_comparisons(comparisons: Sequence[Comparison], console: Console) -> None:
    """Prints what was compared with plain decoding alone, for people."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("T", "asked", "same answers"):
        table.add_column(column, no_wrap=True)
    for each in comparisons:
        said = f"{each.same} of {each.answers}"
        if each.first_difference is not None:
            said += f"; one differs after {each.first_difference} tokens"
        table.add_row(f"{each.temperature:g}", each.way, said)
    console.print(table)
    if all(each.same == each.answers for each in comparisons):
        console.print("[green]Every answer is the same, token by token.[/]")


if __name__ == "__main__":
    sys.exit(main())
