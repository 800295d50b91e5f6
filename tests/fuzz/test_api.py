"""Requests made from the OpenAPI schema, good ones and bad ones: every answer is one that the schema has."""

import base64
import contextlib
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from starlette.types import Receive, Scope, Send

from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

SECONDS = float(os.environ.get("DDETR_FUZZ_SECONDS", "25"))
PATIENCE_MS = 60_000
EXAMPLES = 40  # in a round; rounds go on until the time is over


def picture(file_format: str, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, width, 3), 200, np.uint8)).save(buffer, file_format)
    return buffer.getvalue()


PICTURES = [picture(name, width) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF") for width in (1, 32)]
schemathesis.openapi.format("binary", st.sampled_from(PICTURES))
schemathesis.openapi.format("byte", st.sampled_from([base64.b64encode(data).decode() for data in PICTURES]))
schemathesis.openapi.media_type("image/*", st.sampled_from(PICTURES))

SERVED = create_app(Settings(bundle=Path("none"), decode_threads=2, log_level="error"), FakeEngine())


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The service, which never ends: schemathesis starts and stops it several times, and a stop is for good."""
    if scope["type"] != "lifespan":
        await SERVED(scope, receive, send)
        return
    for stage in ("startup", "shutdown"):
        await receive()
        await SERVED.state.service.start()
        await send({"type": f"lifespan.{stage}.complete"})


CONFIG = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": ["400", "405", "413", "415", "422"]}}}
)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", app, config=CONFIG)


def check(case: schemathesis.Case) -> None:
    if "x-schemathesis-unknown-property" in (case.headers or {}):
        return  # it wants this refused, but a request may have any header
    parts = case.body if case.media_type == "multipart/form-data" and isinstance(case.body, dict) else {}
    if any(value == [] for name, value in parts.items() if name != "images"):
        return  # it wants a part refused of which it sends none
    if case.meta.generation.mode == GenerationMode.POSITIVE:
        heed_what_no_schema_says(case)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        if 0 < float(case.headers["X-Timeout-Ms"]) < PATIENCE_MS:  # 504 is a right answer to a millisecond
            case.headers["X-Timeout-Ms"] = str(PATIENCE_MS)
    case.call_and_validate()


def heed_what_no_schema_says(case: schemathesis.Case) -> None:
    """Leave out of a good request what is wrong for this model, or beside its other parameters."""
    query, headers = case.query or {}, case.headers or {}
    if "classes" in query:
        query["classes"] = "red,2"
    if query.get("format") == "coco":
        query.pop("box_format", None)
        query.pop("units", None)
    if query.get("format") == "image" and isinstance(case.body, dict) and len(case.body["images"]) != 1:
        del query["format"]
    if isinstance(case.body, bytes):
        case.headers = {**headers, "Content-Type": "image/*"}  # schemathesis would say of a JPEG that it is a PNG


@SCHEMA.parametrize()
@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_every_operation_answers_as_its_schema_says(case: schemathesis.Case) -> None:
    check(case)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_detect_answers_as_its_schema_says(mode: GenerationMode) -> None:
    strategy = SCHEMA["/detect"]["POST"].as_strategy(generation_mode=mode)
    deadline_s = time.monotonic() + SECONDS / 2
    rounds = 0
    while time.monotonic() < deadline_s:

        @seed(rounds)
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def play(case: schemathesis.Case) -> None:
            check(case)

        play()
        rounds += 1
    assert rounds
