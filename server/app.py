"""Wires the service: settings, bundle, engines, routes. The one place where everything meets."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from bundle import BundleError, read_bundle
from server.engine import Engine, open_engines
from server.errors import ServiceError, StartupError
from server.metrics import Metrics
from server.observe import Observe
from server.page import build_page_router
from server.routes import build_router, error_response, http_error_response
from server.service import Service
from server.settings import Settings


def create_app(settings: Settings | None = None, engine: Engine | Sequence[Engine] | None = None) -> FastAPI:
    """The application, with its service at `app.state.service`.

    Without `settings` they come from the environment; without `engine` (one, or one an instance) the bundle that the
    settings name is opened. Raises StartupError.
    """
    settings = settings or Settings()
    metrics = Metrics()
    service = Service(settings, _engines(settings, engine), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPIOffline(  # FastAPI's /docs, without its scripts from elsewhere: many a GPU host has no way out
        docs_url="/docs",
        redoc_url=None,
        title="ddetr",
        description="Deformable DETR over HTTP: images in, boxes, classes and scores out.",
        version=service.manifest.model.version,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(build_router(service))
    app.include_router(build_page_router())
    app.add_middleware(Observe, metrics=metrics, clock=service.clock)

    @app.exception_handler(ServiceError)
    async def answer_service_error(request: Request, error: ServiceError) -> Response:
        if request.url.path == "/detect":
            metrics.rejected.labels(error.code).inc()
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        return http_error_response(request, error)

    return app


def _engines(settings: Settings, engine: Engine | Sequence[Engine] | None) -> Sequence[Engine]:
    if engine is None:
        try:
            return open_engines(settings, read_bundle(settings.bundle))
        except BundleError as error:
            raise StartupError(str(error)) from error
    return engine if isinstance(engine, Sequence) else [engine]
