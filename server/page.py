"""The page at `/`: a picture in, its boxes drawn over it. One file, nothing from outside."""

import base64
import hashlib
import io
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

_SAMPLE_SEED = 7
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def build_page_router() -> APIRouter:
    """`/` and the sample picture it offers."""
    html = (files("server") / "static" / "page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _content_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    @router.get("/sample.jpg")
    def sample() -> Response:  # not async: drawing takes a while the first time
        return Response(_sample_jpeg(), media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    return router


@cache
def _sample_jpeg() -> bytes:
    from PIL import Image

    from samples.smears import draw_smear  # here, so that a server that nobody looks at does not load it

    buffer = io.BytesIO()
    Image.fromarray(draw_smear(_SAMPLE_SEED).image).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _content_policy(html: str) -> str:
    """A policy that lets this very script and style run, this server be asked, and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
