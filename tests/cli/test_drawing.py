"""The picture that `ddetr detect --draw` writes is the one that `format=image` answers with."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base
from starlette.testclient import TestClient

from cli.main import main
from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import GREEN, RED, encode, rectangle


def scene(width: int, height: int) -> Image.Image:
    """Noise, with a red and a green rectangle."""
    pixels = np.random.default_rng(0).integers(0, 120, (height, width, 3), np.uint8)
    for color, box in ((RED, (0.1, 0.2, 0.5, 0.7)), (GREEN, (0.55, 0.0, 0.95, 0.4))):
        x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
        pixels[y0:y1, x0:x1] = color
    return Image.fromarray(pixels)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    return exif


def see_through() -> Image.Image:
    picture = scene(200, 120).convert("RGBA")
    picture.putalpha(rectangle(size=(200, 120), background=(90, 90, 90)).convert("L"))
    return picture


FILES = {
    "plain.jpg": encode(scene(320, 240), "JPEG"),
    "progressive.jpg": encode(scene(320, 240), "JPEG", progressive=True, subsampling=0),
    "turned.jpg": encode(scene(320, 240), "JPEG", exif=turned()),
    "grey.jpg": encode(scene(320, 240).convert("L"), "JPEG"),
    "cmyk.jpg": encode(scene(320, 240).convert("CMYK"), "JPEG"),
    "plain.png": encode(scene(97, 61)),
    "turned.png": encode(scene(97, 61), exif=turned()),
    "see-through.png": encode(see_through()),
    "lossy.webp": encode(scene(320, 240), "WEBP"),
    "deflated.tif": encode(scene(320, 240), "TIFF", compression="tiff_adobe_deflate"),
    "palette.bmp": encode(scene(320, 240).quantize(64), "BMP"),
    "large.png": encode(scene(2100, 1500), compress_level=1),
    "tiny.png": encode(Image.new("RGB", (1, 1), RED)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_command_and_the_service_draw_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.detect.open_engine", lambda settings: FakeEngine())
    (tmp_path / name).write_bytes(FILES[name])
    assert main(["detect", str(tmp_path / name), "--draw", str(tmp_path / "drawn"), "--threshold", "0.3"]) == 0
    with TestClient(create_app(Settings(bundle=Path("none")), FakeEngine())) as client:
        response = client.post(
            "/detect?format=image&threshold=0.3", content=FILES[name], headers={"Content-Type": "image/*"}
        )
    assert response.status_code == 200, response.text
    drawn = (tmp_path / "drawn" / name).with_suffix(".png").read_bytes()
    assert drawn == response.content
    assert drawn != encode(Image.open(tmp_path / name).convert("RGB"), compress_level=3), "nothing is drawn on it"
