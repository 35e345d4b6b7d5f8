"""What /metrics tells, in Prometheus' text format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine):
        """engine: its stats() are read when /metrics is."""
        self.registry = CollectorRegistry()
        common = {"namespace": "gpt4v", "registry": self.registry}
        self.requests = Counter("requests", "requests that were answered", ("path", "status"), **common)
        self.seconds = Histogram("request_seconds", "from a request's first byte to its answer's last", ("path",),
                                 buckets=SECONDS, **common)  # fmt: skip
        self.first = Histogram("first_token_seconds", "from a request's first byte to its answer's first token",
                               buckets=SECONDS, **common)  # fmt: skip
        self.prompt_tokens = Counter("prompt_tokens", "positions of prompts, media included", **common)
        self.cached_tokens = Counter("cached_prompt_tokens", "those of them that the prefix cache had", **common)
        self.completion_tokens = Counter("completion_tokens", "tokens of answers", **common)
        self.refused = Counter("refused", "what moderation has refused", ("category", "where"), **common)
        self.registry.register(_Engine(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine:
    def __init__(self, engine):
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """What only grows has a name that ends in _total."""
        for name, value in self.engine.stats().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"gpt4v_engine_{name.removesuffix('_total')}", f"the engine's {name}", value=value)
