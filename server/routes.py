"""The HTTP face: every route, and what of a request each stage gets to see."""

import asyncio
import math
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from http import HTTPStatus
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive

from server.admit import Ticket, body_length, priority, timeout_ms
from server.body import check_media_type, read_images
from server.errors import BadParameter, ClientGone, DeadlinePassed, ServiceError
from server.metrics import CONTENT_TYPE, Metrics
from server.options import DetectOptions, category_ids, parse_options
from server.respond import ImageAnswer, check_outcomes, coco_body, error_content, json_body
from server.schema import DETECT_RESPONSES, METRICS_RESPONSES, MODEL_RESPONSES, HealthSchema, detect_request
from server.served import Served
from server.service import Service
from server.shortcut import Endpoint
from server.timing import server_timing, slowest, until_answered

DETECT_PATH = "/detect"
_ALL_DEFAULTS = DetectOptions()

T = TypeVar("T")


def build_detect(service: Service) -> Endpoint:
    """What answers a POST to DETECT_PATH."""
    settings = service.settings

    async def detect(request: Request) -> Response:
        """Send one or more images; get the boxes, classes and scores of what is in them."""
        state = request.state
        headers: Mapping[str, str] = state.headers
        arrived_s: float = state.arrived_s
        options = parse_options(request.query_params.multi_items()) if request.scope["query_string"] else _ALL_DEFAULTS
        served = service.served
        category_ids(options.classes, served.manifest.categories)  # unknown ones are refused before the body is read
        deadline_s = arrived_s + timeout_ms(headers, settings.default_timeout_ms) / 1e3
        check_media_type(headers)
        length = body_length(headers, settings.max_body_bytes)
        state.priority = priority(headers)
        with served.used(), service.admission.admit(deadline_s, state.priority, length) as ticket:
            try:
                async with asyncio.timeout(deadline_s - service.clock()):
                    return await _detect(service, served, request, options, deadline_s, ticket)
            except TimeoutError as error:
                service.metrics.images.labels(DeadlinePassed.code).inc(len(ticket.places))
                taken_ms = (deadline_s - arrived_s) * 1e3
                raise DeadlinePassed(f"no answer within {taken_ms:g} ms") from error
            except ClientGone:
                service.metrics.images.labels(ClientGone.code).inc(len(ticket.places))
                raise

    return detect


def build_router(service: Service, detect: Endpoint) -> APIRouter:
    """The routes of `service`."""
    settings = service.settings

    router = APIRouter()
    router.post(
        DETECT_PATH,
        summary="Find objects in images",
        response_class=Response,
        responses=DETECT_RESPONSES,
        openapi_extra=detect_request(min(settings.max_images_per_request, settings.queue_limit)),
    )(detect)

    @router.get("/model", summary="The model in service", response_class=Response, responses=MODEL_RESPONSES)
    async def model() -> Response:
        served = service.served
        running = {"engine": served.engine_name, "gate": gate_content(served)}
        return json_response(served.manifest.model_dump(mode="json") | running)

    @router.get(
        "/livez",
        summary="Whether the process works; 503 asks for a restart",
        response_class=Response,
        responses={200: {"model": HealthSchema}, 503: {"model": HealthSchema}},
    )
    async def livez() -> Response:
        trouble = service.trouble()
        return json_response({"status": "ok"}) if trouble is None else json_response({"status": trouble}, 503)

    @router.get(
        "/readyz",
        summary="Whether requests should be sent here",
        response_class=Response,
        responses={200: {"model": HealthSchema}, 503: {"model": HealthSchema}},
    )
    async def readyz() -> Response:
        if (reason := service.why_not_ready()) is not None:
            return json_response({"status": reason}, 503)
        degraded = service.degraded()
        return json_response({"status": "ok"} if degraded is None else {"status": "ok", "degraded": degraded})

    return router


def build_metrics_router(metrics: Metrics) -> APIRouter:
    """/metrics: with the other routes, or on a port of its own."""
    router = APIRouter()

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=METRICS_RESPONSES)
    async def exposition() -> Response:
        # Beside the loop: a GPU that fell off the bus holds whoever asks its driver.
        return Response(await asyncio.to_thread(metrics.exposition), media_type=CONTENT_TYPE)

    return router


async def _detect(
    service: Service, served: Served, request: Request, options: DetectOptions, deadline_s: float, ticket: Ticket
) -> Response:
    state = request.state
    async with ticket.reading():
        most, max_body_bytes = service.most_images(ticket.priority), service.settings.max_body_bytes
        uploads = await read_images(request.stream(), state.headers, most, max_body_bytes, ticket.received)
    if options.format == "image" and len(uploads) != 1:
        raise BadParameter(f"format: 'image' takes one image, not {len(uploads)}")
    to_draw = uploads[0] if options.format == "image" else None
    ticket.read([len(upload) if isinstance(upload, bytes) else 0 for upload in uploads], keep=to_draw is not None)
    arrived_s: float = state.arrived_s
    state.images = len(uploads)
    work = service.detect(uploads, options, deadline_s, ticket, served, arrived_s)
    del uploads  # each is let go as soon as it is decoded
    outcomes = await while_connected(request.receive, work)
    for outcome in outcomes:
        if isinstance(outcome, ServiceError):
            service.metrics.images.labels(outcome.code).inc()
            if outcome.status == 500:
                state.cause = outcome.__cause__
    check_outcomes(outcomes)

    media_type = "application/json"
    first = outcomes[0]
    if isinstance(first, ImageAnswer) and isinstance(to_draw, bytes):
        content, media_type = await service.draw(to_draw, first.detections), "image/png"
    elif options.format == "coco":
        content = coco_body(outcomes, served.manifest.categories)
    else:
        content = json_body(outcomes, served.manifest, options, state.request_id)
    answers = [outcome for outcome in outcomes if isinstance(outcome, ImageAnswer)]
    times = until_answered([answer.times for answer in answers], (service.clock() - arrived_s) * 1e3)
    for each in times:
        service.metrics.observe_image(each)
    if len(answers) < len(outcomes):
        state.images_failed = len(outcomes) - len(answers)
    state.batch_size = max(answer.batch_size for answer in answers)
    state.times = slowest(times)
    return Response(content, media_type=media_type, headers={"Server-Timing": server_timing(state.times)})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientGone when the client closes the connection."""
    task = asyncio.current_task()
    assert task is not None
    others_cancelling, gone, over = task.cancelling(), False, False

    def leave(_: object) -> None:
        nonlocal gone
        if not over:
            gone = True
            task.cancel()

    leaving = asyncio.ensure_future(_disconnected(receive))
    leaving.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() <= others_cancelling:
            raise ClientGone("the client closed the connection") from None
        raise
    finally:
        over = True
        leaving.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def gate_content(served: Served) -> list[dict[str, Any]]:
    """How each engine was found right, for JSON."""
    return [asdict(verdict) for verdict in served.verdicts]


def error_response(request: Request, error: ServiceError) -> Response:
    """`{"error": {"code", "message"}, "request_id"}` with its status and, if it has one, its Retry-After."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body may still come
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = error_content(error.code, error.message) | {"request_id": request.state.request_id}
    return json_response(content, error.status, headers)


def http_error_response(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors (no such path, no such method) in our form."""
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
    request.state.error_code = code
    content = error_content(code, message) | {"request_id": request.state.request_id}
    return json_response(content, error.status_code, error.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON."""
    return Response(
        orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )
