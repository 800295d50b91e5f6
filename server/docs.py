"""`/docs`: the API described, to be tried out. Where a key is needed the page asks for it, and sends it itself."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Response

from server.schema import name_model
from server.service import Service

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def build_docs_router() -> APIRouter:
    """`/docs`, with the scripts that fastapi-offline brings; the same in every installation."""
    html = (files("server") / "static" / "docs.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _content_policy(html), "Cache-Control": "no-cache"}
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return router


def describe_served(app: FastAPI, service: Service) -> None:
    """Let `app` describe itself, whenever it is asked, with the version and the classes of the bundle in service."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema, manifest = described(), service.served.manifest
        name_model(schema, manifest.model.version, manifest.categories)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _content_policy(html: str) -> str:
    """This very script and what this server has; Swagger UI writes styles into its elements."""
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in _SCRIPT.findall(html)]
    scripts = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' blob: data:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
