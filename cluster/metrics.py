"""Prometheus metrics, pulled: lower floors keep plain stats, and a collector here reads them when asked.

A `StatsCollector` turns a dataclass (or mapping) of numbers into `pdserve_<subsystem>_<field>`: a field is a
counter where its owner says so, a gauge otherwise. A field that is itself a mapping of numbers is one family with
a label, or several where its keys are tuples, and one with the fields of `router.stats.Histogram` is a histogram.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

PREFIX = "pdserve"
KEY_LABEL = "kind"
_HISTOGRAM_FIELDS = {"bounds", "counts", "total"}

Stats = object
"""A dataclass instance, or a mapping of names to numbers."""
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class StatsCollector(Collector):
    """Reads one stats object at each scrape."""

    def __init__(
        self,
        subsystem: str,
        read: Callable[[], Stats],
        *,
        counters: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        key_labels: Mapping[str, str | tuple[str, ...]] | None = None,
    ) -> None:
        self._subsystem = subsystem
        self._read = read
        self._counters = frozenset(counters)
        self._labels = dict(labels or {})
        self._key_labels = dict(key_labels or {})

    def collect(self) -> Iterator[Family]:
        """One family per field; what has no number is left out. `key_labels` names the labels of a mapping's keys."""
        for field, value in _fields(self._read()):
            if isinstance(value, int | float):
                yield self._plain(field, (), [((), float(value))])
            elif isinstance(value, Mapping) and value.keys() >= _HISTOGRAM_FIELDS:
                yield self._histogram(field, value)
            elif isinstance(value, Mapping):
                names = _as_tuple(self._key_labels.get(field, KEY_LABEL))
                numbers = [(key, each) for key, each in value.items() if isinstance(each, int | float)]
                yield self._plain(field, names, [(_as_tuple(key), float(each)) for key, each in numbers])

    def _plain(
        self, field: str, names: tuple[str, ...], samples: Sequence[tuple[tuple[str, ...], float]]
    ) -> CounterMetricFamily | GaugeMetricFamily:
        kind = CounterMetricFamily if field in self._counters else GaugeMetricFamily
        name = f"{PREFIX}_{self._subsystem}_{field}"
        family = kind(name, f"{field.replace('_', ' ')} of the {self._subsystem}", labels=[*self._labels, *names])
        for values, number in samples:
            family.add_metric([*self._labels.values(), *values], number)
        return family

    def _histogram(self, field: str, value: Mapping[str, Any]) -> HistogramMetricFamily:
        name = f"{field.removesuffix('_s')}_seconds" if field.endswith("_s") else field
        help_text = f"{name.replace('_', ' ')} of the {self._subsystem}"
        family = HistogramMetricFamily(f"{PREFIX}_{self._subsystem}_{name}", help_text, labels=list(self._labels))
        bounds = [*(f"{bound:g}" for bound in value["bounds"]), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(value["counts"]), strict=True))
        family.add_metric(list(self._labels.values()), buckets, value["total"])
        return family

    def describe(self) -> Iterator[Family]:
        """Nothing is asked of the stats before the first scrape."""
        return iter(())


def _as_tuple(key: object) -> tuple[str, ...]:
    return tuple(str(part) for part in key) if isinstance(key, tuple) else (str(key),)


def _fields(stats: Stats) -> Iterable[tuple[str, Any]]:
    if isinstance(stats, Mapping):
        return stats.items()
    if dataclasses.is_dataclass(stats) and not isinstance(stats, type):
        return dataclasses.asdict(stats).items()
    raise TypeError(f"stats must be a dataclass or a mapping, got {type(stats).__name__}")


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
