"""Wires the service: settings, bundle, engines, routes. The one place where everything meets."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.telemetry import TelemetryConfig
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from bundle import BundleError
from server.admin import build_admin_router
from server.docs import build_docs_router, describe_served
from server.engine import Engine, OpenEngine
from server.engine_build import EngineBuilder
from server.errors import ServiceError, StartupError
from server.head import Head
from server.keys import ApiKeys, Gate
from server.metrics import Metrics
from server.metrics_port import listening
from server.observe import Observe, internal_error
from server.page import build_page_router
from server.routes import (
    DETECT_PATH,
    build_detect,
    build_metrics_router,
    build_router,
    error_response,
    http_error_response,
)
from server.served import Opened, open_bundle
from server.service import Service
from server.settings import Settings
from server.shortcut import Endpoint, Shortcut
from server.swap import SWAP_GATE_SECONDS, Swaps
from server.trace import Tracing, open_tracing
from server.version import version

# FastAPI would make spans of its own beside ours, where a provider is set for the whole process.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(
    settings: Settings | None = None, engine: Engine | Sequence[Engine] | OpenEngine | None = None
) -> FastAPI:
    """The application, with its service at `app.state.service` and what swaps bundles at `app.state.swaps`.

    Without `settings` they come from the environment; without `engine` the bundle that the settings name is opened.
    An engine that dies or hangs is replaced by calling `engine` again, if it is a callable that opens one; those
    given as they are (one, or one an instance) are used again as soon as they answer. Raises StartupError.
    """
    settings = settings or Settings()
    metrics = Metrics()
    keys = ApiKeys(settings.api_keys, settings.api_keys_file)
    admin_keys = ApiKeys(settings.admin_keys, asker="/admin needs an admin key")
    service = Service(settings, _opened(settings, engine, metrics), metrics)
    patience_s = max(settings.gate_seconds, SWAP_GATE_SECONDS)
    swaps = Swaps(service, lambda path, given_up: open_bundle(settings, path, metrics, patience_s, given_up))
    builder = EngineBuilder(settings, service, swaps)

    tracing = open_tracing(version())
    metrics_router = build_metrics_router(metrics)
    apart: FastAPI | None = None
    if settings.metrics_port:
        apart = FastAPI(openapi_url=None, redirect_slashes=False, telemetry=_NO_TELEMETRY)
        _dress(apart, [metrics_router], service, keys, admin_keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(asyncio.to_thread, tracing.close)
            if apart is not None:
                await stack.enter_async_context(listening(apart, settings.metrics_host, settings.metrics_port))
            for watching in (asyncio.create_task(keys.watch()), asyncio.create_task(swaps.watch())):
                stack.callback(watching.cancel)
            await service.start()
            builder.start()
            yield
            service.drain()
            await builder.stop()
            await swaps.stop()
            await service.stop()

    app = FastAPIOffline(  # FastAPI's /docs, without its scripts from elsewhere: many a GPU host has no way out
        docs_url=None,  # see docs.py
        redoc_url=None,
        redirect_slashes=False,  # to wherever the Host header says
        telemetry=_NO_TELEMETRY,
        title="ddetr",
        description="Deformable DETR over HTTP: images in, boxes, classes and scores out.",
        version=service.served.manifest.model.version,
        lifespan=lifespan,
    )
    app.state.service, app.state.swaps = service, swaps
    describe_served(app, service)
    detect = build_detect(service)
    routers = [build_router(service, detect), build_page_router(), build_docs_router()]
    if admin_keys.required:
        routers.append(build_admin_router(service, swaps))
    if apart is None:
        routers.append(metrics_router)
    _dress(app, routers, service, keys, admin_keys, tracing, detect)
    return app


def _dress(
    app: FastAPI,
    routers: Iterable[APIRouter],
    service: Service,
    keys: ApiKeys,
    admin_keys: ApiKeys,
    tracing: Tracing | None = None,
    detect: Endpoint | None = None,
) -> None:
    """Give `app` its routes, and what every request meets on its way to them and back."""
    paths = {app.openapi_url or ""}
    for router in routers:
        app.include_router(router)
        paths |= {getattr(route, "path", "") for route in router.routes}

    @app.exception_handler(ServiceError)
    async def answer_service_error(request: Request, error: ServiceError) -> Response:
        if request.scope["path"].removeprefix(request.scope.get("root_path", "")) == DETECT_PATH:
            service.metrics.rejected.labels(error.code).inc()
        request.state.error_code = error.code
        if error.status == 500:
            request.state.cause = error.__cause__
        return error_response(request, error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        return http_error_response(request, error)

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(_: Request, error: ClientDisconnect) -> None:
        """Nothing is sent, and `Observe` says so."""

    @app.exception_handler(Exception)
    async def answer_unforeseen(request: Request, _: Exception) -> Response:  # the error itself goes on to `Observe`
        return internal_error(request.state.request_id)

    app.build_middleware_stack = partial(_build_layers, app)  # type: ignore[method-assign]
    # From the inside to the outside.
    if detect is not None:
        app.add_middleware(Shortcut, path=DETECT_PATH, endpoint=detect, explain=answer_service_error)
    app.add_middleware(Head)
    app.add_middleware(
        Gate, keys=keys, admin_keys=admin_keys, refuse=answer_service_error, open_pages=service.settings.open_pages
    )
    app.add_middleware(Observe, metrics=service.metrics, clock=service.clock, paths=paths, tracing=tracing)


def _build_layers(app: FastAPI) -> ASGIApp:
    """FastAPI's own layers inside of those that were added, not around them: what `Shortcut` answers passes none."""
    added, app.user_middleware = app.user_middleware, []
    try:
        outermost = FastAPI.build_middleware_stack(app)
    finally:
        app.user_middleware = added
    for layer in reversed(added):
        outermost = layer.cls(outermost, *layer.args, **layer.kwargs)
    return outermost


def _opened(settings: Settings, engine: Engine | Sequence[Engine] | OpenEngine | None, metrics: Metrics) -> Opened:
    """The engines to begin with."""
    if engine is None:
        try:
            return open_bundle(settings, settings.bundle, metrics, settings.gate_seconds)
        except BundleError as error:
            raise StartupError(str(error)) from error
    if callable(engine):
        return Opened([engine() for _ in range(settings.engine_instances)], [engine] * settings.engine_instances)
    return Opened(engine if isinstance(engine, Sequence) else [engine])
