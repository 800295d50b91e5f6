"""The service as a Ray Serve application: `serve run deploy/ray/cpu.yaml`; each replica is a whole service."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.logs import open_log
from server.malloc import tame_malloc
from server.settings import Settings

NAME = "Detector"
_SPARE_S = 5.0  # beside the drain, for engines to close
_YOUNG_OBJECTS = 5000
"""As server/run.py has it: what is there at the start is left alone by the collector."""


class Detector:
    """A replica. Requests reach its application as they are, so POST /detect keeps its contract."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """`given` are settings by name; what they leave out comes from the environment of the replica."""
        tame_malloc()
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        self._settings = replica_settings(given, cpus, ray.get_gpu_ids())
        open_log(self._settings.log_level, self._settings.log_format)

    def __serve_build_asgi_app__(self) -> FastAPI:  # noqa: N807  the name is Ray's
        """Called once, after the constructor; Serve then runs the application's lifespan, which warms the engine."""
        app = create_app(self._settings)
        app.add_middleware(_OneRequestId)
        self._service = app.state.service
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG_OBJECTS)
        return app

    def check_health(self) -> None:
        """Asked by Serve every few seconds; a replica that raises three times in a row is replaced."""
        if (trouble := self._service.trouble()) is not None:
            raise RuntimeError(trouble)


class _OneRequestId:
    """Serve sends X-Request-ID itself, with the same value: ours is left out, so that the header comes once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [each for each in message["headers"] if each[0].lower() != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_once)


def replica_settings(given: Mapping[str, Any], cpus: float, gpu_ids: Sequence[int | str]) -> Settings:
    """Settings of a replica to which Ray has given so many CPUs and these GPUs.

    Threads that are not set are as many as the CPUs, not as the host's cores: Ray does not confine a replica to its
    share. Replicas on GPUs of one host each need a metrics port of their own: the number of the GPU is added.
    """
    settings = Settings(**given)
    share = max(1, int(cpus))
    updates: dict[str, int] = {}
    if settings.engine_threads == 0:
        updates["engine_threads"] = max(1, share // settings.engine_instances)
    if "decode_threads" not in settings.model_fields_set:
        updates["decode_threads"] = share
    if settings.metrics_port and gpu_ids:
        updates["metrics_port"] = settings.metrics_port + int(gpu_ids[0])
    return Settings(**{**given, **updates})


def build(args: dict[str, Any]) -> Application:
    """What `import_path: deploy.ray.application:build` names; `args` are settings, refused here if they cannot be."""
    settings = Settings(**args)
    deployment = serve.deployment(
        serve.ingress()(Detector),
        name=NAME,
        # More than the service admits: it is the one that refuses, with a Retry-After worked out from its queue.
        max_ongoing_requests=2 * settings.queue_limit,
        max_queued_requests=2 * settings.queue_limit,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=settings.drain_timeout_ms / 1e3 + _SPARE_S,
        health_check_period_s=5,
        health_check_timeout_s=10,
    )
    return deployment.bind(args)
