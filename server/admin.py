"""/admin/bundle: swap to another bundle, and see how far that is. Behind the admin keys, see `keys.Gate`."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.body import read_body
from server.errors import BadBody, BadParameter, BodyTimeout, BundleNotPromoted
from server.promote import Trial
from server.routes import gate_content, json_response, while_connected
from server.schema import ADMIN_DELETE_RESPONSES, ADMIN_GET_RESPONSES, ADMIN_POST_RESPONSES
from server.service import Service
from server.settings import LONGEST_TRIAL_S
from server.swap import Swaps

_MOST_BYTES = 64 * 1024

_KEY = {
    "name": "X-API-Key",
    "in": "header",
    "required": True,
    "description": "an admin key; or as `Authorization: Bearer KEY`",
    "schema": {"type": "string"},
}


class SwapRequest(BaseModel):
    """Which bundle, and how it is tried on live pictures first."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            pattern=r"^[^\x00]+$",
            description="folder of the bundle on the server, absolute or below bundle_root",
        ),
    ]
    shadow_percent: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            description="of the live pictures, shown to it before the switch and to the old bundle after it, while "
            "that is kept ready (rollback_seconds); 0: none, and no disagreement is noticed. Where the bundles resize "
            "differently, pictures of more than 16 MiB once decoded are not shown, but counted. Default: the setting's",
        ),
    ] = None
    shadow_seconds: Annotated[
        float | None,
        Field(
            gt=0,
            le=LONGEST_TRIAL_S,
            allow_inf_nan=False,
            description="for how long, before the switch. Default: the setting's",
        ),
    ] = None
    min_agreement: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="share of strong detections that both must find for it to be switched to, and to stay. "
            "Default: the setting's",
        ),
    ] = None


def build_admin_router(service: Service, swaps: Swaps) -> APIRouter:
    """The routes for administrators."""
    router = APIRouter()

    @router.post(
        "/admin/bundle",
        summary="Swap to another bundle",
        status_code=202,
        response_class=Response,
        responses=ADMIN_POST_RESPONSES,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": SwapRequest.model_json_schema()}},
            },
            "parameters": [
                _KEY,
                _wait_parameter("answer when the swap is over: 200, or 422 if the bundle is not in service"),
            ],
        },
    )
    async def begin(request: Request) -> Response:
        """Opens and proves the bundle beside the one in service, then switches between two requests. 202: begun."""
        wait = _wait(request)
        try:
            async with asyncio.timeout(service.settings.body_timeout_ms / 1e3):
                body = await read_body(request.stream(), _MOST_BYTES)
        except TimeoutError as error:
            raise BodyTimeout(f"the body did not come in {service.settings.body_timeout_ms:g} ms") from error
        try:
            asked = SwapRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise BadBody(f"{where}: {first['msg']}") from error
        said = asked.model_dump(exclude={"path"}, exclude_none=True)
        swap = swaps.begin(Path(asked.path), "request", Trial.of(service.settings.model_copy(update=said)))
        if not wait:
            return json_response(swap.content(), 202, {"Location": "/admin/bundle"})
        await while_connected(request.receive, swap.over.wait())
        if swap.state != "promoted":
            raise BundleNotPromoted(f"swap {swap.id}: {swap.state}: {swap.reason}")
        return json_response(swap.content())

    @router.delete(
        "/admin/bundle",
        summary="End the swap under way",
        status_code=202,
        response_class=Response,
        responses=ADMIN_DELETE_RESPONSES,
        openapi_extra={"parameters": [_KEY, _wait_parameter("answer when the swap is over")]},
    )
    async def end(request: Request) -> Response:
        """Before the switch nothing changes; after it, while the old bundle is kept ready, that one is back."""
        wait = _wait(request)
        swap = swaps.give_up("an administrator ended it")
        if not wait:
            return json_response(swap.content(), 202, {"Location": "/admin/bundle"})
        await while_connected(request.receive, swap.over.wait())
        return json_response(swap.content())

    @router.get(
        "/admin/bundle",
        summary="The bundle in service, and swaps",
        response_class=Response,
        responses=ADMIN_GET_RESPONSES,
        openapi_extra={"parameters": [_KEY]},
    )
    async def state() -> Response:
        """The bundle in service, and the last swaps, the newest first."""
        served = service.served
        in_service: dict[str, Any] = {
            "path": None if served.opened.path is None else str(served.opened.path),
            "model": served.manifest.model.model_dump(),
            "engine": served.engine_name,
            "gate": gate_content(served),
        }
        return json_response(
            {
                "in_service": in_service,
                "busy": swaps.busy,
                "swaps": [swap.content() for swap in reversed(swaps.history)],
            }
        )

    return router


def _wait_parameter(description: str) -> dict[str, Any]:
    schema = {"type": "boolean", "default": False}
    return {"name": "wait", "in": "query", "description": description, "schema": schema}


def _wait(request: Request) -> bool:
    given = request.query_params.multi_items()
    for name, value in given:
        if name != "wait":
            raise BadParameter(f"{name[:100]}: no such parameter; there is wait")
        if value not in ("true", "false"):
            raise BadParameter(f"wait: {value[:100]!r} is neither true nor false")
    return ("wait", "true") in given
