"""The shapes of bodies, for /docs. Answers are written by `respond`, not by these."""

import copy
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from bundle import Manifest
from server.batch_queue import PRIORITIES
from server.errors import ServiceError
from server.gate import Result
from server.options import DetectOptions
from server.promote import Cause, State


class ModelNameSchema(BaseModel):
    """The model that answered."""

    name: str
    version: str


class DetectionSchema(BaseModel):
    """One object found."""

    label: str
    class_id: int
    score: float = Field(ge=0, le=1)
    box: list[float] = Field(min_length=4, max_length=4, description="as box_format and units say; inside the picture")


class ImageSchema(BaseModel):
    """What was found in one image, best first."""

    width: int = Field(description="px, of the picture as displayed: after its EXIF orientation")
    height: int
    detections: list[DetectionSchema]


def _codes(kind: type[ServiceError] = ServiceError) -> set[str]:
    return {kind.code}.union(*(_codes(each) for each in kind.__subclasses__()))


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(json_schema_extra={"enum": [*sorted(_codes())]}, examples=["image_truncated"])
    message: str


class ErrorSchema(BaseModel):
    """In the place of one image's answer."""

    error: ErrorDetail


class RefusalSchema(ErrorSchema):
    """In the place of a request's answer."""

    request_id: str


class DetectSchema(BaseModel):
    """The answer of /detect with format=json."""

    model: ModelNameSchema
    images: list[ImageSchema | ErrorSchema]
    request_id: str


class CocoImage(BaseModel):
    """An image of a COCO dataset."""

    id: int
    width: int | None = None
    height: int | None = None
    error: ErrorDetail | None = None


class CocoCategory(BaseModel):
    """A category of a COCO dataset."""

    id: int
    name: str


class CocoAnnotation(BaseModel):
    """A detection as a COCO annotation with a score."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float] = Field(min_length=4, max_length=4, description="x, y, width, height in px")
    area: float
    iscrowd: int
    score: float


class CocoSchema(BaseModel):
    """The answer of /detect with format=coco."""

    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[CocoAnnotation]


class UploadSchema(BaseModel):
    """One image of a JSON request."""

    model_config = ConfigDict(extra="forbid")

    b64: str = Field(
        description="the image file in base64; a data: URL is understood, too",
        json_schema_extra={"format": "byte", "contentEncoding": "base64"},
    )


class GateSchema(BaseModel):
    """How an engine in service was found to answer right."""

    engine: str
    result: str = Field(
        json_schema_extra={"enum": [*get_args(Result)]},
        description="`no proof`: the bundle has none; `off`: by the settings; `not asked`: the engine was handed over",
    )
    precision: str
    compared: int = Field(description="answers to pictures of the bundle's proof")
    left_out: list[str] = Field(description="what there was no time for")
    worst: dict[str, float] = Field(description="figure to the worst of all answers; boxes in shares of the side")
    seconds: float
    passed_over: list[str] = Field(description="better engines that are not served, and what was wrong with them")
    unavailable: list[str] = Field(description="better engines that could not be opened here, and why")


class ModelSchema(Manifest):
    """The answer of /model: the bundle's manifest, and what runs it."""

    engine: str
    gate: list[GateSchema] = Field(description="of each engine")


class HealthSchema(BaseModel):
    """Health: `ok`, or why not."""

    status: str
    degraded: str | None = Field(None, description="what does not work as it should, though requests are answered")


_FILE = {"type": "string", "format": "binary"}


def _query_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A query parameter's: it is there or not, and is never null."""
    shown = {key: value for key, value in schema.items() if key not in {"description", "title", "anyOf"}}
    if "anyOf" in schema:
        shown |= next(each for each in schema["anyOf"] if each.get("type") != "null")
    return {key: value for key, value in shown.items() if value is not None}


DETECT_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": _FILE, "minItems": 1}},
                    "required": ["images"],
                    "additionalProperties": False,
                }
            },
            "image/*": {"schema": _FILE},
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "images": {"type": "array", "items": UploadSchema.model_json_schema(), "minItems": 1}
                    },
                    "required": ["images"],
                    "additionalProperties": False,
                }
            },
        },
    },
    "parameters": [
        {
            "name": name,
            "in": "query",
            "description": schema.get("description", ""),
            "schema": _query_schema(schema),
        }
        for name, schema in DetectOptions.model_json_schema()["properties"].items()
    ]
    + [
        {
            "name": "X-Timeout-Ms",
            "in": "header",
            "description": "the caller's deadline, in ms from the request's arrival",
            "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86_400_000},
        },
        {
            "name": "X-Priority",
            "in": "header",
            "description": "batch work fills what interactive work leaves, and never the whole queue",
            "schema": {"type": "string", "enum": list(PRIORITIES), "default": "interactive"},
        },
        {
            "name": "X-Request-Id",
            "in": "header",
            "description": "taken over into answer and log if it has 1 to 128 visible ASCII characters; else replaced",
            "schema": {"type": "string"},
        },
        {
            "name": "X-API-Key",
            "in": "header",
            "description": "where the server has API keys; or as `Authorization: Bearer KEY`",
            "schema": {"type": "string"},
        },
    ],
}


def detect_request(max_images: int) -> dict[str, Any]:
    """DETECT_REQUEST with the most images of a request."""
    request = copy.deepcopy(DETECT_REQUEST)
    for media_type in ("multipart/form-data", "application/json"):
        request["requestBody"]["content"][media_type]["schema"]["properties"]["images"]["maxItems"] = max_images
    return request


def name_model(schema: dict[str, Any], version: str, categories: Mapping[int, str]) -> None:
    """Put a model's version into the API's schema, and two of its own classes as the example of `classes`."""
    schema["info"]["version"] = version
    for parameter in schema["paths"]["/detect"]["post"]["parameters"]:
        if parameter["name"] == "classes":
            parameter["schema"]["examples"] = [",".join([*dict.fromkeys(categories.values())][:2])]


_ERRORS = {
    400: "the request cannot be understood",
    401: "an API key is needed",
    408: "the body came too slowly",
    413: "too many bytes, pixels or images",
    415: "not a type of body, or not a format of picture, that is served",
    422: "none of the images can be read",
    429: "the queue is full; Retry-After says for how long",
    500: "the engine failed",
    503: "draining, or the deadline cannot be met; Retry-After says for how long",
    504: "the deadline passed",
}

DETECT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": DetectSchema | CocoSchema,
        "description": "detections, in descending score",
        "content": {"image/png": {"schema": _FILE}},
    },
    **{status: {"model": RefusalSchema, "description": text} for status, text in _ERRORS.items()},
}
for _status in (429, 503):
    DETECT_RESPONSES[_status]["headers"] = {
        "Retry-After": {"description": "seconds", "required": True, "schema": {"type": "integer", "minimum": 1}}
    }

_UNAUTHORIZED: dict[int | str, dict[str, Any]] = {401: {"model": RefusalSchema, "description": _ERRORS[401]}}

MODEL_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"model": ModelSchema}, **_UNAUTHORIZED}

METRICS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    **_UNAUTHORIZED,
}


class ShadowSchema(BaseModel):
    """What came of the live pictures that were shown to the other bundle, too."""

    compared: int
    disagreed: int
    failed: int
    dropped: int = Field(description="not shown: the other engine was busy")
    too_large: int = Field(
        description="not shown: the bundles resize differently, and the decoded picture is larger than 16 MiB"
    )
    agreement: float = Field(description="mean share of strong detections that both bundles find")


class SwapSchema(BaseModel):
    """A swap to another bundle, and how far it is."""

    id: str
    path: str
    cause: str = Field(json_schema_extra={"enum": [*get_args(Cause)]})
    state: str = Field(json_schema_extra={"enum": [*get_args(State)]})
    reason: str | None = Field(description="why the bundle is not in service")
    model: ModelNameSchema | None
    gate: list[GateSchema]
    shadow: ShadowSchema | None = Field(description="before the switch, shown to the new bundle")
    shadow_after: ShadowSchema | None = Field(description="after the switch, shown to the old one")
    began_at: float = Field(description="seconds since 1970")
    ended_at: float | None


class InServiceSchema(BaseModel):
    """The bundle that new requests are answered by."""

    path: str | None
    model: ModelNameSchema
    engine: str
    gate: list[GateSchema]


class SwapsSchema(BaseModel):
    """The answer of GET /admin/bundle."""

    in_service: InServiceSchema
    busy: bool
    swaps: list[SwapSchema] = Field(description="the newest first")


_ADMIN_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": RefusalSchema, "description": "an admin key is needed"}
}

ADMIN_GET_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"model": SwapsSchema}, **_ADMIN_ERRORS}

ADMIN_DELETE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": SwapSchema, "description": "with wait: what became of it"},
    202: {"model": SwapSchema, "description": "it will end soon"},
    **_ADMIN_ERRORS,
    400: {"model": RefusalSchema, "description": _ERRORS[400]},
    409: {"model": RefusalSchema, "description": "no swap is under way that could be ended"},
}

ADMIN_POST_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": SwapSchema, "description": "with wait: the bundle is in service, and the one before is gone"},
    202: {"model": SwapSchema, "description": "begun"},
    **_ADMIN_ERRORS,
    **{
        status: {"model": RefusalSchema, "description": text}
        for status, text in {
            400: _ERRORS[400],
            403: "the path is outside of bundle_root",
            408: _ERRORS[408],
            409: "another swap is under way",
            413: "too many bytes",
            422: "with wait: the bundle is not in service; the message says why",
            503: "draining",
        }.items()
    },
}
