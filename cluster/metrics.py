"""Prometheus metrics, pulled: lower floors keep plain stats, and a collector here reads them when asked.

A `StatsCollector` turns a dataclass (or mapping) of numbers into `pdserve_<subsystem>_<field>`: a field is a
counter where its owner says so, a gauge otherwise. `Latency` is a histogram for what only a moment can tell.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

PREFIX = "pdserve"
LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)

Stats = object
"""A dataclass instance, or a mapping of names to numbers."""


class StatsCollector(Collector):
    """Reads one stats object at each scrape."""

    def __init__(
        self,
        subsystem: str,
        read: Callable[[], Stats],
        *,
        counters: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._subsystem = subsystem
        self._read = read
        self._counters = frozenset(counters)
        self._labels = dict(labels or {})

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One family per number; what is no number is left out."""
        for field, value in _numbers(self._read()):
            name = f"{PREFIX}_{self._subsystem}_{field}"
            help_text = f"{field.replace('_', ' ')} of the {self._subsystem}"
            family: CounterMetricFamily | GaugeMetricFamily
            if field in self._counters:
                family = CounterMetricFamily(name, help_text, labels=list(self._labels))
            else:
                family = GaugeMetricFamily(name, help_text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family

    def describe(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Nothing is asked of the stats before the first scrape."""
        return iter(())


def _numbers(stats: Stats) -> Iterator[tuple[str, float]]:
    if isinstance(stats, Mapping):
        items = list(stats.items())
    elif dataclasses.is_dataclass(stats) and not isinstance(stats, type):
        items = [(field.name, getattr(stats, field.name)) for field in dataclasses.fields(stats)]
    else:
        raise TypeError(f"stats must be a dataclass or a mapping, got {type(stats).__name__}")
    for name, value in items:
        if isinstance(value, int | float):
            yield name, float(value)
        elif isinstance(value, Mapping):
            yield from _numbers(value)


class Latency:
    """A histogram of durations in seconds, `pdserve_<subsystem>_<name>_seconds`."""

    def __init__(self, registry: CollectorRegistry, subsystem: str, name: str, help_text: str) -> None:
        self._histogram = Histogram(
            f"{PREFIX}_{subsystem}_{name}_seconds", help_text, registry=registry, buckets=LATENCY_BUCKETS_S
        )

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._histogram.observe(seconds)


@dataclass(frozen=True)
class MetricsServer:
    """A running /metrics endpoint."""

    address: str
    registry: CollectorRegistry
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        """Stop serving; returns once the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def serve(collectors: Iterable[Collector] = (), *, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Serve /metrics over HTTP from a thread; OSError if the port is taken."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    server, thread = start_http_server(port, addr=host, registry=registry)
    return MetricsServer(f"{host}:{server.server_port}", registry, server, thread)
