"""OpenTelemetry: a span for every request and one for each of its stages, sent by OTLP where the environment says."""

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from server.timing import STAGES, StageTimes

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger("ddetr.trace")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_LONGEST_TEXT = 200  # of what comes from outside
# Fields of a log line, as attributes by their own names; the others have names in the conventions for HTTP.
_OWN = {name: f"ddetr.{name}" for name in ("request_id", "images", "images_failed", "batch_size", "priority", "error")}


class Tracing:
    """Makes spans, and sends them beside the event loop."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.propagate import extract

        self._provider = provider
        self._tracer = provider.get_tracer("ddetr")
        self._extract = extract

    def begin(self, scope: Scope) -> "RequestSpan":
        """A request has arrived just now. Its span belongs to the caller's trace, if `traceparent` names one."""
        from opentelemetry.trace import SpanKind

        headers = Headers(scope=scope)

        began_ns = time.time_ns()
        server, client = scope.get("server"), scope.get("client")
        attributes: dict[str, str | int] = {
            "http.request.method": scope["method"],
            "url.scheme": scope.get("scheme", "http"),
            "url.path": scope["path"][:_LONGEST_TEXT],
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        if server is not None:
            attributes["server.address"] = server[0]
            if server[1] is not None:
                attributes["server.port"] = server[1]
        if client is not None:
            attributes["client.address"] = client[0]
        if (agent := headers.get("user-agent")) is not None:
            attributes["user_agent.original"] = agent[:_LONGEST_TEXT]
        span = self._tracer.start_span(
            scope["method"],
            context=self._extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=began_ns,
        )
        return RequestSpan(self._tracer, span, began_ns)

    def close(self) -> None:
        """Send what has not been sent. Takes some seconds where nobody receives it."""
        self._provider.shutdown()


class RequestSpan:
    """The span of one request."""

    def __init__(self, tracer: "Tracer", span: "Span", began_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._began_ns = began_ns
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(
        self, fields: Mapping[str, Any], times: StageTimes | None, total_s: float, failure: BaseException | None
    ) -> None:
        """The request has ended after `total_s`; `fields` are those of its log line."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        span = self._span
        end_ns = self._began_ns + int(total_s * 1e9)
        if span.is_recording():
            status = fields["status"]
            if fields["route"] != "unmatched":
                span.update_name(f"{fields['method']} {fields['route']}")
                span.set_attribute("http.route", fields["route"])
            span.set_attribute("http.response.status_code", status)
            span.set_attribute("http.request.body.size", fields["bytes_in"])
            span.set_attribute("http.response.body.size", fields["bytes_out"])
            for name, attribute in _OWN.items():
                if name in fields:
                    span.set_attribute(attribute, fields[name])
            if failure is not None:
                span.record_exception(failure, timestamp=end_ns)
            if status >= 500:
                span.set_attribute("error.type", type(failure).__qualname__ if failure is not None else str(status))
                span.set_status(StatusCode.ERROR)
            if times is not None:
                self._end_stages(set_span_in_context(span), times, fields)
        span.end(end_ns)

    def _end_stages(self, context: "Context", times: StageTimes, fields: Mapping[str, Any]) -> None:
        start_ns = self._began_ns
        for stage in STAGES:
            end_ns = start_ns + int(getattr(times, stage) * 1e6)
            attributes = {"ddetr.batch_size": fields["batch_size"]} if stage == "inference" else None
            child = self._tracer.start_span(stage, context=context, attributes=attributes, start_time=start_ns)
            child.end(end_ns)
            start_ns = end_ns


def open_tracing(version: str, environment: Mapping[str, str] | None = None) -> Tracing | None:
    """Tracing to the collector that the environment names (OTEL_EXPORTER_OTLP_ENDPOINT and its kin), or None.

    Nothing of OpenTelemetry's SDK is imported for None. A collector without the
    SDK installed is a warning: the service does not depend on who watches it.
    """
    environment = os.environ if environment is None else environment
    named = next((name for name in _ENDPOINTS if environment.get(name)), None)
    if named is None:
        return None
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning("%s is set, but no traces are sent: pip install 'ddetr[otel]'", named)
        return None
    attributes = {"service.version": version}
    if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        attributes["service.name"] = "ddetr"
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        logger.warning("traces are sent as http/protobuf, not as %r", protocol)
    logger.info("traces are sent where %s says", named)
    return Tracing(provider)
