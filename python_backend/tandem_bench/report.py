"""Puts all results into one Markdown file with plots, and the main table into README.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem_bench import exactness, invariance, lookahead, mechanism_tables, plots, tables
from tandem_bench.results import read
from tandem_runtime.paths import ROOT

_PARTS: dict[str, tuple[str, Callable[[tables.Cells], str]]] = {
    "ceilings": ("The machine's ceilings", tables.facts),
    "peers": ("Against other engines", tables.peers),
    "engine": ("The engine alone", tables.engine),
    "profile": ("Where the time of a step goes", tables.profile),
    "triton": ("Through Triton", tables.triton),
    "lookahead": ("The adaptive lookahead against every fixed one", lookahead.summary),
    "noise": ("Guesses under shared noise against the likeliest", lookahead.noise_summary),
    "mechanisms": ("What each mechanism for a CPU brings", mechanism_tables.summary),
    "invariance": ("The same answers whatever else is in the batch", invariance.summary),
    "exactness": ("What it costs to be exact", exactness.summary),
    "prompts": ("Long prompts and shared ones", tables.each_figure),
    "windows": ("A cache that frees what is behind a window", tables.each_figure),
    "growth": ("Growth", tables.growth),
    "arrivals": ("Poisson arrivals", tables.arrivals),
    "soak": ("Soak", lambda cells: tables.facts({"end": cells["end"]})),
}
_MARKERS = re.compile(r"(<!-- benchmark -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def run(output: Path, readme: bool) -> None:
    """Writes `README.md` and the plots into the folder of the results.

    Args:
        output: the folder.
        readme: whether to renew the table in the project's README.md too.

    Raises:
        ValueError: there are no results, or README.md has no place for the table.
    """
    parts = {name: read(output / f"{name}.json") for name in _PARTS if _exists(output, name)}
    if not parts:
        raise ValueError(f"{output} holds no results: run another part first")
    text = ["# Measured\n", "Made by `scripts/bench.py report`; medians of rounds in turns.\n"]
    for name, results in parts.items():
        title, make = _PARTS[name]
        text += [f"## {title}\n", f"{stated(results)}\n", make(results["cells"])]
        if name in plots.PLOTS:
            plots.PLOTS[name](results["cells"], output / f"{name}.png")
            text.append(f"![{title}]({name}.png)\n")
    (output / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(f"written to {output / 'README.md'}")
    if readme:
        if "peers" not in parts:
            raise ValueError("README.md's table is of part peers, which was not run")
        insert(ROOT / "README.md", main_table(parts["peers"]))


def _exists(output: Path, name: str) -> bool:
    return (output / f"{name}.json").exists()


def stated(results: dict[str, Any]) -> str:
    """The conditions of a part, in a line."""
    machine, settings = results["conditions"], dict(results["settings"])
    verifier = Path(settings.pop("model")["verifier"]).name
    return "; ".join(
        [
            verifier,
            f"{machine['cpu']} ({', '.join(machine['cpu_flags'])}), {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB",
            ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers")),
            f"code {machine['code']}",
            *(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()),
        ]
    )


def main_table(peers: dict[str, Any]) -> str:
    """Throughput of all systems, and where it was measured."""
    rounds = tables.by_round(peers["cells"])
    return "\n".join([tables.grid(rounds, tables.speed), stated(peers), ""])


def insert(path: Path, text: str) -> None:
    """Puts text between the markers of a file.

    Raises:
        ValueError: the file has no markers.
    """
    before = path.read_text(encoding="utf-8")
    after, count = _MARKERS.subn(lambda match: match[1] + text + match[2], before)
    if not count:
        raise ValueError(f"{path} has no lines <!-- benchmark --> and <!-- /benchmark -->")
    path.write_text(after, encoding="utf-8")
