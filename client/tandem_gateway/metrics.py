"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

_TRITON = b"""\
# Speculation, queue and K/V cache: on the metrics port of each Triton, http://HOST:8002/metrics,
# where the names begin with tandem_ as well.
"""


class Metrics:
    """The series of one gateway. Keys go by the first eight digits of their SHA-256."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tandem_gateway_requests",
            "Answered requests to /v1, /tokenize and /detokenize, by key and HTTP status.",
            ("key", "status"),
            registry=self._registry,
        )
        self._tokens = Counter(
            "tandem_gateway_tokens",
            "Tokens, by key: of prompts that were read, and written.",
            ("key", "kind"),
            registry=self._registry,
        )
        self._refused = Counter(
            "tandem_gateway_refused",
            "Requests and connections over a limit, by the limit.",
            ("reason",),
            registry=self._registry,
        )
        self.connections = self._gauge("connections", "Open connections.")
        self.body_bytes = self._gauge("body_bytes", "Bytes in the bodies of requests under way.")
        self.streams = self._gauge("streams", "Prompts that are being answered.")

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"tandem_gateway_{name}", description, registry=self._registry)

    def answered(self, key: str, status: int) -> None:
        """Counts an answer."""
        self._requests.labels(key, str(status)).inc()

    def used(self, key: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Counts tokens."""
        self._tokens.labels(key, "prompt").inc(num_prompt_tokens)
        self._tokens.labels(key, "output").inc(num_output_tokens)

    def refused(self, reason: str) -> None:
        """Counts what was over a limit."""
        self._refused.labels(reason).inc()

    def page(self) -> bytes:
        """All series, as Prometheus reads them."""
        return _TRITON + generate_latest(self._registry)
