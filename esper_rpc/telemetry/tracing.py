"""OpenTelemetry traces: one from a trainer's step through Tamiyo, Kasmina and Urza. Untraced steps cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

from esper_rpc.errors import ConfigError

TRACER = trace.get_tracer("esper")
TRACEPARENT = "traceparent"
ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
RATIO_VARIABLE = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_RATIO = 0.01

Attributes = Mapping[str, str | int | float | bool]


def current_traceparent() -> str:
    """Return the W3C trace context of the current span, empty unless it is sampled."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return ""
    return f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-01"


def context_of(traceparent: str) -> Context:
    """Return the context that a traceparent stands for; nonsense is an empty one."""
    return propagate.extract({TRACEPARENT: traceparent})


def record_span(
    name: str,
    *,
    start_ns: int,
    end_ns: int,
    traceparent: str = "",
    attributes: Attributes | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
) -> None:
    """Record something that is over already, under a remote parent or the current span."""
    context = context_of(traceparent) if traceparent else None
    span = TRACER.start_span(name, context=context, start_time=start_ns, attributes=attributes, kind=kind)
    span.end(end_ns)


def configure_tracing(service: str, environ: Mapping[str, str]) -> Callable[[], object]:
    """Export to the OTLP endpoint that OTEL_EXPORTER_OTLP_ENDPOINT names, if any; returns how to flush.

    OTEL_TRACES_SAMPLER_ARG is the share of steps that are traced; whoever is asked follows whoever asks.

    Raises:
        ConfigError: When the exporter is not installed, or the share is not a number from 0 to 1.
    """
    endpoint = environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; install it with: pip install 'esper-rpc[servers]'") from error
    provider = TracerProvider(
        resource=Resource.create({SERVICE_NAME: service}), sampler=ParentBased(TraceIdRatioBased(_ratio(environ)))
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.force_flush


def _ratio(environ: Mapping[str, str]) -> float:
    text = environ.get(RATIO_VARIABLE, str(DEFAULT_RATIO))
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigError(f"{RATIO_VARIABLE} = {text} is out of range; allowed is 0 to 1.")
    return ratio
