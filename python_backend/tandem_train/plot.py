"""The course of training as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Draws loss and held-out acceptance by position over the updates."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("loss", "acceptance"), strict=True):
        entries = [entry for entry in history if name in entry]
        width = max(1, len(entries) // 200)
        for index in range(len(entries[0][name]) if entries else 0):
            values = [entry[name][index] for entry in entries]
            groups = [values[start : start + width] for start in range(0, len(values), width)]
            steps = [entry["step"] for entry in entries[::width]]
            means = [sum(group) / len(group) for group in groups]
            panel.plot(steps, means, marker="." * (width == 1), label=f"position {index + 1}")
        panel.set_xlabel("updates")
        panel.set_title(name if name == "loss" else "acceptance, held-out")
        if entries:
            panel.legend()
    figure.savefig(path, dpi=100)
