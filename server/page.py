"""The page at `/`: a picture in, its boxes drawn over it. One answer, nothing from outside."""

import base64
import gzip
import hashlib
import io
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

_SAMPLE_SEED = 4  # cells of all kinds, every one found and none twice
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def build_page_router() -> APIRouter:
    """`/` and the sample picture it offers. Neither asks for an API key: the page itself does, when it needs one."""
    html = assemble_page()
    plain, packed = html.encode(), gzip.compress(html.encode(), mtime=0)
    headers = {  # and what every answer has: `harden`
        "Content-Security-Policy": content_policy(html),
        "Cache-Control": "no-cache",
        "ETag": f'W/"{hashlib.sha256(plain).hexdigest()[:16]}"',  # weak: packed or not, it is the same page
        "Vary": "Accept-Encoding",
    }
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(packed, media_type="text/html", headers={**headers, "Content-Encoding": "gzip"})
        return Response(plain, media_type="text/html", headers=headers)

    @router.get("/sample.jpg")
    def sample() -> Response:  # not async: drawing takes a while the first time
        return Response(_sample_jpeg(), media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    return router


def assemble_page() -> str:
    """page.html with the style and the scripts that it names in the places of their names: one request shows it all."""
    folder = files("server") / "static"

    def content(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    html = _STYLE.sub(lambda found: f"<style>{content(found[1])}</style>", content("page.html"))
    return _SCRIPT.sub(lambda found: f"<script>{content(found[1])}</script>", html)


def content_policy(html: str) -> str:
    """A policy that lets these very scripts and styles run, this server be asked, and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


@cache
def _sample_jpeg() -> bytes:
    from PIL import Image

    from samples.smears import draw_smear  # here, so that a server that nobody looks at does not load it

    buffer = io.BytesIO()
    Image.fromarray(draw_smear(_SAMPLE_SEED).image).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
