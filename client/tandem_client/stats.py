"""What a server with Tandem is doing, read from its `/metrics`."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from urllib.error import URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from tandem_client.errors import RequestError, ServerUnavailableError

DEFAULT_METRICS_URL = "http://localhost:8002/metrics"
_TIMEOUT_SECONDS = 5.0
_PREFIX = "tandem:"


@dataclass(frozen=True)
class Sample:
    """All series of one model at a moment."""

    at: float
    # (name, labels) -> value, without the labels model and version.
    series: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def total(self, name: str, **labels: str) -> float:
        """The sum over the series of a name that have these labels."""
        wanted = set(labels.items())
        return sum(
            value
            for (other, have), value in self.series.items()
            if other == name and wanted <= set(have)
        )

    def values(self, name: str, label: str) -> list[str]:
        """The values of a label, in order of appearance."""
        found = {
            dict(have)[label]: None
            for (other, have) in self.series
            if other == name and label in dict(have)
        }
        return list(found)


@dataclass(frozen=True)
class DrafterFigures:
    """What a drafter did between two samples; None where it drafted nothing."""

    drafts_per_second: float
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    acceptance_by_position: list[float]


@dataclass(frozen=True)
class Figures:
    """What happened between two samples, and the load at the second; None where nothing did."""

    tokens_per_second: float
    steps_per_second: float
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_hit_rate: float | None
    num_preemptions: int
    time_to_first_token: float | None
    drafters: dict[str, DrafterFigures] = field(default_factory=dict)
    # Why speculation gains little, in sentences.
    low_gain: list[str] = field(default_factory=list)
    is_synthetic: bool = False


def read_sample(url: str, model: str) -> Sample:
    """Reads `/metrics`.

    Raises:
        ServerUnavailableError: nobody answers at `url`.
        RequestError: the answer has no metrics of this model.
    """
    try:
        with urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            text = answer.read().decode()
    except (URLError, OSError, ValueError) as error:
        raise ServerUnavailableError(
            f"no metrics at {url}: {error}; start a server with `make serve`, or give --metrics-url"
        ) from error
    series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(_PREFIX) and sample.labels.get("model") == model:
                labels = tuple(
                    item for item in sample.labels.items() if item[0] not in ("model", "version")
                )
                series[sample.name.removeprefix(_PREFIX), labels] = sample.value
    if not series:
        raise RequestError(f"{url} shows no metrics of a model {model!r}", "NOT_FOUND")
    return Sample(time.monotonic(), series)


def compare(before: Sample, after: Sample) -> Figures:
    """What happened between two samples."""
    seconds = max(1e-9, after.at - before.at)

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    drafters = {}
    for name in after.values("spec_decode_num_drafts_total", "drafter"):
        drafts = grown("spec_decode_num_drafts_total", drafter=name)
        drafted = grown("spec_decode_num_draft_tokens_total", drafter=name)
        accepted = grown("spec_decode_num_accepted_tokens_total", drafter=name)
        per_position = "spec_decode_num_accepted_tokens_per_pos_total"
        by_position: dict[int, float] = defaultdict(float)
        for position in after.values(per_position, "position"):
            by_position[int(position)] = grown(per_position, drafter=name, position=position)
        drafters[name] = DrafterFigures(
            drafts_per_second=drafts / seconds,
            acceptance_rate=accepted / drafted if drafted else None,
            mean_acceptance_length=1 + accepted / drafts if drafts else None,
            acceptance_by_position=[by_position[i] / drafts for i in sorted(by_position)]
            if drafts
            else [],
        )
    first_tokens = grown("time_to_first_token_seconds_count")
    looked_up = grown("prefix_cache_queries_total")
    return Figures(
        tokens_per_second=grown("generation_tokens_total") / seconds,
        steps_per_second=grown("engine_steps_total") / seconds,
        num_running=int(after.total("num_requests_running")),
        num_waiting=int(after.total("num_requests_waiting")),
        kv_cache_usage=_kv_cache_usage(after),
        prefix_cache_hit_rate=grown("prefix_cache_hits_total") / looked_up if looked_up else None,
        num_preemptions=int(grown("num_preemptions_total")),
        time_to_first_token=grown("time_to_first_token_seconds_sum") / first_tokens
        if first_tokens
        else None,
        drafters=drafters,
        low_gain=_low_gain(after),
        is_synthetic=after.total("synthetic_acceptance") > 0,
    )


def _kv_cache_usage(sample: Sample) -> float:
    """The share of its blocks that the scarcest group of layers has given away."""
    shares = [0.0]
    for group in sample.values("kv_cache_blocks", "group"):
        blocks = sample.total("kv_cache_blocks", group=group)
        used = sample.total("kv_cache_blocks_used", group=group)
        shares.append(used / blocks if blocks else 0.0)
    return max(shares)


def _low_gain(sample: Sample) -> list[str]:
    sentences = []
    for (name, labels), figure in sample.series.items():
        if name == "spec_decode_low_gain" and figure >= 0:
            told = dict(labels)
            sentences.append(f"{told['drafter']}: {told['reason']}: {figure:.2f} {told['advice']}")
    return sentences


def render(figures: Figures) -> RenderableType:
    """The figures for a terminal."""
    load = Table.grid(padding=(0, 2))
    first_token, hit_rate = figures.time_to_first_token, figures.prefix_cache_hit_rate
    for name, text in (
        ("tokens/s", f"{figures.tokens_per_second:.1f}"),
        ("steps/s", f"{figures.steps_per_second:.1f}"),
        ("running", str(figures.num_running)),
        ("waiting", str(figures.num_waiting)),
        ("KV cache", f"{figures.kv_cache_usage:.0%}"),
        ("prefix hits", "-" if hit_rate is None else f"{hit_rate:.0%}"),
        ("preempted", str(figures.num_preemptions)),
        ("first token", "-" if first_token is None else f"{first_token * 1000:.0f} ms"),
    ):
        load.add_row(name, text)
    drafters = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("drafter", "drafts/s", "accepted", "length", "position", ""):
        drafters.add_column(column)
    for name, drafter in figures.drafters.items():
        rate, length = drafter.acceptance_rate, drafter.mean_acceptance_length
        head = [
            name,
            f"{drafter.drafts_per_second:.1f}",
            "-" if rate is None else f"{rate:.0%}",
            "-" if length is None else f"{length:.2f}",
        ]
        for position, share in enumerate(drafter.acceptance_by_position or [0.0]):
            bar = ProgressBar(total=1, completed=share, width=24)
            drafters.add_row(*head, f"{position + 1}: {share:.0%}", bar)
            head = [""] * 4
    notes = [f"[yellow]{escape(sentence)}[/]" for sentence in figures.low_gain]
    if figures.is_synthetic:
        notes.append("[red]Drafts are accepted by coin, for a benchmark: no real figures.[/]")
    return Group(load, "", drafters, *notes)
