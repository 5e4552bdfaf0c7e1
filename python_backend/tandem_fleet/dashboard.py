"""Writes the Grafana dashboard, deploy/components/monitoring/dashboard.json."""

from __future__ import annotations

from itertools import count
from string import ascii_uppercase
from typing import NamedTuple

from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from tandem_runtime.paths import ROOT

PATH = ROOT / "deploy/components/monitoring/dashboard.json"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_OF = 'namespace="$namespace"'
_RATE = "[$__rate_interval]"


class Graph(NamedTuple):
    """A panel: expressions by the legend of their series."""

    title: str
    description: str
    unit: str
    series: dict[str, str]


def _rate(name: str, by: str = "") -> str:
    return f"sum{by and f' by ({by})'} (rate(tandem:{name}{{{_OF}}}{_RATE}))"


def _quantile(share: float, name: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{name}_seconds_bucket', 'le')})"


def _quantiles(name: str) -> dict[str, str]:
    return {f"p{100 * share:.0f}": _quantile(share, name) for share in (0.5, 0.95, 0.99)}


ROWS = {
    "Requests": [
        Graph(
            "Time to first token",
            "From arrival, the queue included.",
            "s",
            _quantiles("time_to_first_token"),
        ),
        Graph(
            "Time for each further token",
            "Means over requests.",
            "s",
            _quantiles("time_per_output_token"),
        ),
        Graph(
            "Tokens",
            "Of prompts and of answers, all pods together.",
            "short",
            {
                "generated a second": _rate("generation_tokens_total"),
                "of prompts a second": _rate("prompt_tokens_total"),
            },
        ),
        Graph(
            "Outcomes",
            "Ends by reason, a second.",
            "short",
            {
                "{{finished_reason}}": _rate("request_success_total", "finished_reason"),
                "{{reason}}": _rate("request_failure_total", "reason"),
                "refused": f"sum(rate(nv_inference_request_failure{{{_OF}}}{_RATE}))",
            },
        ),
    ],
    "Speculation": [
        Graph(
            "Draft tokens accepted",
            "Share, by drafter.",
            "percentunit",
            {
                "{{drafter}}": _rate("spec_decode_num_accepted_tokens_total", "drafter")
                + " / "
                + _rate("spec_decode_num_draft_tokens_total", "drafter")
            },
        ),
        Graph(
            "Mean acceptance length",
            "Tokens of a round with drafts, the verifier's own included.",
            "short",
            {
                "{{drafter}}": "1 + "
                + _rate("spec_decode_num_accepted_tokens_total", "drafter")
                + " / "
                + _rate("spec_decode_num_drafts_total", "drafter")
            },
        ),
        Graph(
            "Accepted, by position",
            "Share of the rounds in which the draft at this place was accepted.",
            "percentunit",
            {
                "{{drafter}} {{position}}": _rate(
                    "spec_decode_num_accepted_tokens_per_pos_total", "drafter, position"
                )
                + " / on (drafter) group_left "
                + _rate("spec_decode_num_drafts_total", "drafter")
            },
        ),
        Graph(
            "Draft tokens of a round",
            "Where this is 0, drafting doesn't pay.",
            "short",
            {
                "{{drafter}}": _rate("spec_decode_num_draft_tokens_total", "drafter")
                + " / "
                + _rate("spec_decode_num_drafts_total", "drafter")
            },
        ),
    ],
    "Pods": [
        Graph(
            "Requests",
            "Running and waiting: what the autoscaler follows.",
            "short",
            {
                "{{pod}}": f"tandem:requests:pod{{{_OF}}}",
                "{{pod}} waiting": f"tandem:requests_waiting:pod{{{_OF}}}",
            },
        ),
        Graph(
            "KV cache in use",
            "Full, it preempts sequences.",
            "percentunit",
            {"{{pod}}": f"tandem:kv_cache_usage:pod{{{_OF}}}"},
        ),
        Graph(
            "Prefix cache hits",
            "Share of the prompts' tokens that were there already.",
            "percentunit",
            {
                "{{pod}}": _rate("prefix_cache_hits_total", "pod")
                + " / "
                + _rate("prefix_cache_queries_total", "pod")
            },
        ),
        Graph(
            "Time of a step",
            "Means, by phase.",
            "s",
            {
                "{{phase}}": _rate("step_seconds_total", "phase")
                + " / on () group_left "
                + _rate("engine_steps_total")
            },
        ),
        Graph(
            "Preemptions",
            "Sequences freed and computed again, a second.",
            "short",
            {"{{pod}}": _rate("num_preemptions_total", "pod")},
        ),
        Graph(
            "Since the last sign of life",
            "Of the model's process. More than seconds: it is dead, whatever Triton says.",
            "s",
            {"{{pod}}": f"time() - tandem:alive_timestamp_seconds{{{_OF}}}"},
        ),
    ],
}


def main() -> int:
    """Writes the file and returns the exit status."""
    PATH.write_text(build(), encoding="utf-8")
    return 0


def build() -> str:
    """The dashboard as Grafana imports it."""
    source = DatasourceVariable("source").label("Prometheus").type("prometheus")
    namespace = (
        QueryVariable("namespace")
        .label("Namespace")
        .datasource(_SOURCE)
        .query("label_values(tandem:engine_steps_total, namespace)")
    )
    dashboard = (
        Dashboard("Tandem")
        .uid("tandem")
        .description("Speculative decoding on Triton. Made by scripts/make_dashboard.py.")
        .tags(["tandem", "triton"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .with_variable(source)
        .with_variable(namespace)
    )
    numbers = count(1)
    for title, graphs in ROWS.items():
        dashboard = dashboard.with_row(Row(title).id(next(numbers)))
        for graph in graphs:
            dashboard = dashboard.with_panel(_panel(graph).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard.build()) + "\n"


def _panel(graph: Graph) -> Panel:
    panel = (
        Panel()
        .title(graph.title)
        .description(graph.description)
        .unit(graph.unit)
        .min(0)
        .span(6)
        .height(8)
        .datasource(_SOURCE)
    )
    for letter, (legend, expression) in zip(ascii_uppercase, graph.series.items(), strict=False):
        query = Dataquery().ref_id(letter).expr(expression).legend_format(legend)
        panel = panel.with_target(query)
    return panel
