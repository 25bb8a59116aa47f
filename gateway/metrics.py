"""What the gateway counts, and how Prometheus reads it: pulled from state when asked, not pushed from all over."""

from collections import Counter as Tally
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.protocol import End, Failed
from gateway.session import Stream

if TYPE_CHECKING:
    from common.errors import Code
    from gateway.upstream import Upstream

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """Plain numbers that the code adds to, and `render` for a scrape."""

    def __init__(self, upstream: "Upstream") -> None:
        self._upstream = upstream
        self.unauthenticated = 0
        self.connections = 0
        self.authentications_failed = 0
        self.requests = 0
        self.resumes = 0
        self.events = 0
        self.pauses = 0
        self.errors: Tally[Code] = Tally()
        self.ended: Tally[str] = Tally()
        self.completion_tokens = 0
        self.prompt_tokens = 0
        self._registry = CollectorRegistry()
        self._first_token = Histogram(
            "weftline_first_token_seconds",
            "From a request to its first event",
            registry=self._registry,
            buckets=SECONDS,
        )
        self._queued = Histogram(
            "weftline_queue_seconds", "From a request to its lease", registry=self._registry, buckets=SECONDS
        )
        self._registry.register(self)

    def finished(self, stream: Stream, terminal: End | Failed) -> None:
        """A request got its terminal."""
        self.ended["end" if isinstance(terminal, End) else terminal.code.value] += 1
        if isinstance(terminal, End):
            self.completion_tokens += terminal.stats.completion_tokens
            self.prompt_tokens += terminal.stats.prompt_tokens
        if stream.leased_at is not None:
            self._queued.observe(stream.leased_at - stream.submitted_at)
        if stream.first_event_at is not None:
            self._first_token.observe(stream.first_event_at - stream.submitted_at)

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        fleet = self._upstream.fleet
        for name, text, value in (
            ("connections", "Authenticated WebSocket connections", self.connections),
            ("connections_unauthenticated", "Connections that have not authenticated yet", self.unauthenticated),
            ("streams", "Requests without a terminal", self._upstream.streams),
            ("streams_waiting", "Requests that no host had yet", self._upstream.waiting),
            ("broker_connected", "1 while the broker answers", int(self._upstream.connected)),
            ("fleet_workers", "Workers, as last told by the broker", fleet.workers),
            ("fleet_models", "Models, as last told by the broker", len(fleet.models)),
        ):
            yield GaugeMetricFamily(f"weftline_{name}", text, value)
        for name, text, value in (
            ("requests", "Requests accepted from clients", self.requests),
            ("resumes", "Requests that clients came back for", self.resumes),
            ("events", "Lines passed on to clients", self.events),
            ("completion_tokens", "Tokens generated, as the engines count them", self.completion_tokens),
            ("prompt_tokens", "Tokens of prompts, as the engines count them", self.prompt_tokens),
            ("authentications_failed", "Refused signatures and unknown clients", self.authentications_failed),
            ("pauses", "Times a connection's streams paused because it did not read", self.pauses),
        ):
            yield CounterMetricFamily(f"weftline_{name}", text, value)
        errors = CounterMetricFamily("weftline_errors", "Errors told to clients", labels=["code"])
        for code, count in self.errors.items():
            errors.add_metric([code.value], count)
        yield errors
        ended = CounterMetricFamily("weftline_requests_ended", "Terminals, by outcome", labels=["outcome"])
        for outcome, count in self.ended.items():
            ended.add_metric([outcome], count)
        yield ended
