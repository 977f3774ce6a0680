"""What the service measures, in Prometheus' text form.

The ingress measures requests. Replicas report their own counters (vLLM's, under vLLM's names, and the draft
link's), which are shown with a `replica` label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve_app.admission import Admission
from serve_app.backend import ReplicaReport

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


class Telemetry:
    """The ingress's own metrics. No label ever holds anything that a client wrote."""

    def __init__(self, *admissions: Admission) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.responses = Counter(
            "unmask_http_responses", "HTTP responses sent.", ["method", "route", "status"], registry=registry
        )
        self.stream_errors = Counter(
            "unmask_stream_errors",
            "Streams that ended with an error event, by its status.",
            ["status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("unmask_prompt_tokens", "Prompt tokens of finished requests.", registry=registry)
        self.completion_tokens = Counter(
            "unmask_completion_tokens", "Response tokens of finished requests.", registry=registry
        )
        self.resumed = Counter(
            "unmask_requests_resumed", "Times that a request went on at another replica.", registry=registry
        )
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "Wait for a free slot.")
        self.first_token_time = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.")
        self.total_time = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.")
        running = Gauge("unmask_requests_running", "Choices being generated.", registry=registry)
        running.set_function(lambda: sum(admission.running for admission in admissions))
        waiting = Gauge("unmask_requests_waiting", "Choices waiting for a slot.", registry=registry)
        waiting.set_function(lambda: sum(admission.waiting for admission in admissions))

    def exposition(
        self, reports: Sequence[ReplicaReport], model: str, names: Mapping[str, str] = MappingProxyType({})
    ) -> bytes:
        """All metrics as text, with what the replicas reported.

        Args:
            reports: of the replicas.
            model: the name of the model that they serve.
            names: of the models that replicas of other roles serve, by role.
        """
        replicas = CollectorRegistry()
        replicas.register(_ReplicaCollector(reports, model, names))
        return generate_latest(self._registry) + generate_latest(replicas)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_SECONDS, registry=self._registry)


class _ReplicaCollector:
    """Replica reports as metric families: `..._total` names become counters, others gauges, lists go by position."""

    def __init__(self, reports: Sequence[ReplicaReport], model: str, names: Mapping[str, str]) -> None:
        self._reports = reports
        self._model = model
        self._names = names

    def collect(self) -> Iterable[Metric]:
        """One family for each reported name, and the number of live replicas."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        alive = GaugeMetricFamily("unmask_replicas", "Live replicas.", labels=["role"])
        for role in ("target", "draft", "diffusion"):
            alive.add_metric([role], sum(report.role == role for report in self._reports))
        for report in self._reports:
            for name, value in report.stats.items():
                if _NAME.fullmatch(name):
                    self._add(families, report, name, value)
        return [alive, *families.values()]

    def _add(
        self,
        families: dict[str, CounterMetricFamily | GaugeMetricFamily],
        report: ReplicaReport,
        name: str,
        value: object,
    ) -> None:
        by_position = isinstance(value, list | tuple)
        if name not in families:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            labels = ["model_name", "replica", *(["position"] if by_position else [])]
            families[name] = kind(name, f"Reported by the {report.role} replicas.", labels=labels)
        labels = [self._names.get(report.role, self._model), report.replica]
        if by_position:
            for position, entry in enumerate(value):
                families[name].add_metric([*labels, str(position)], float(entry))
        elif isinstance(value, int | float):
            families[name].add_metric(labels, float(value))
