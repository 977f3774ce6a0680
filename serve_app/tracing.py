"""OpenTelemetry traces of requests: a span in the ingress, one in each replica that answered, one in each draft.

Trace context comes in and goes on as W3C `traceparent`. Spans hold ids, counts and times, never a prompt or a response.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracerProvider, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from unmask.errors import ConfigError

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_HEADER = "traceparent"
_PROPAGATOR = TraceContextTextMapPropagator()

NO_SPAN = trace.INVALID_SPAN
"""Of a request that is not traced; what is told to it is lost."""


class Tracing:
    """Spans of one process.

    Args:
        endpoint: address of an OTLP collector (HTTP); None records nothing.
        role: `ingress`, `target`, `draft` or `diffusion`.
        replica: which of them.

    Raises:
        ConfigError: the exporter is not installed.
    """

    def __init__(self, endpoint: str | None, role: str, replica: str = "") -> None:
        self.enabled = endpoint is not None
        self._provider: TracerProvider | None = None
        if endpoint is None:
            self._tracer = NoOpTracerProvider().get_tracer("unmask")
            return
        try:
            exporter = importlib.import_module(_EXPORTER).OTLPSpanExporter
        except ImportError as error:
            raise ConfigError("needs the package extra 'traces'", field="serve.traces_endpoint") from error
        resource = Resource.create({"service.name": f"unmask-{role}", "service.instance.id": replica})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))
        self._tracer = self._provider.get_tracer("unmask")

    def start(
        self, name: str, parent: str | None, kind: SpanKind = SpanKind.INTERNAL, begun_s: float | None = None
    ) -> Span:
        """A span that the caller ends.

        Args:
            name: what is done.
            parent: `traceparent` of whoever asked for it.
            kind: its place between processes.
            begun_s: when it began, in seconds since the epoch; now, if not given.
        """
        context = _PROPAGATOR.extract({_HEADER: parent} if parent else {})
        return self._tracer.start_span(name, context, kind, start_time=_nanoseconds(begun_s))

    def finish(self, span: Span, attributes: Mapping[str, str | int | float], ended_s: float | None = None) -> None:
        """End a span with what has become of it."""
        span.set_attributes(dict(attributes))
        span.end(_nanoseconds(ended_s))

    def close(self) -> None:
        """Send what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


def traceparent(span: Span) -> str | None:
    """The context that a span hands on; None if it is not recorded."""
    if not span.get_span_context().is_valid:
        return None
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier[_HEADER]


def span_id(span: Span) -> int:
    """The 64-bit id of a span; 0 if it is not recorded."""
    return span.get_span_context().span_id


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
