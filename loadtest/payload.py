"""What is sent: pictures from a folder as they are, or drawn smears."""

import io
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loadtest.errors import PicturesMissing
from samples import draw_smear

MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
}
MOST_BYTES = 512 * 2**20
"""Of a folder's pictures, which are held in memory; from a larger one a part is taken by the seed."""

_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Payload:
    """The body of a request to /detect."""

    name: str
    body: bytes
    media_type: str


def drawn(count: int, seed: int, width: int = 640, height: int = 480, upright_every: int = 0) -> list[Payload]:
    """`count` blood smears as JPEG; every `upright_every`-th is turned upright, for another canvas."""
    payloads = []
    for number in range(count):
        upright = upright_every > 0 and number % upright_every == upright_every - 1
        size = (width, height) if upright else (height, width)
        picture = Image.fromarray(draw_smear(seed + number, *size).image)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=_JPEG_QUALITY)
        payloads.append(Payload(f"smear {seed + number}", stream.getvalue(), "image/jpeg"))
    return payloads


def from_folder(folder: Path, seed: int, most_bytes: int = MOST_BYTES) -> list[Payload]:
    """The pictures in and below `folder`, as they are. Raises PicturesMissing."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MEDIA_TYPES and path.is_file())
    if not paths:
        raise PicturesMissing(f"{folder}: no pictures ({', '.join(MEDIA_TYPES)})")
    random.Random(seed).shuffle(paths)
    payloads: list[Payload] = []
    left = most_bytes
    for path in paths:
        left -= path.stat().st_size
        if left < 0 and payloads:
            break
        payloads.append(Payload(str(path.relative_to(folder)), path.read_bytes(), MEDIA_TYPES[path.suffix.lower()]))
    return payloads
