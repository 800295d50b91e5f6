"""Pictures of the page for README.md: a real server, the embedded model, the drawn sample, a Chromium on PATH.

python -m benchmarks.screenshot --output docs
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from loadtest.server_process import serving

MOST_BYTES = 300_000
DESKTOP = {"viewport": {"width": 1280, "height": 860}, "device_scale_factor": 1.5}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
SHOTS = {
    "page": {**DESKTOP, "color_scheme": "light"},
    "page-dark": {**DESKTOP, "color_scheme": "dark"},
    "page-phone": {**PHONE, "color_scheme": "light"},
}
PATIENCE_MS = 60_000


def main(argv: Sequence[str] | None = None) -> int:
    """Write a WebP for each of SHOTS into a folder; 1 where that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder (default: docs)")
    arguments = parser.parse_args(argv)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("no chromium, chromium-browser or google-chrome on PATH: apt-get install chromium", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    with serving([]) as server:
        for name, picture in photograph(server.url, chromium).items():
            path = arguments.output / f"{name}.webp"
            content = webp(picture)
            path.write_bytes(content)
            print(f"{path}: {picture.width}x{picture.height} px, {len(content) / 1000:.0f} kB")
    return 0


def photograph(url: str, chromium: str) -> dict[str, Image.Image]:
    """The page with the sample's answer, in each of SHOTS."""
    from playwright.sync_api import sync_playwright

    pictures = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for name, options in SHOTS.items():
            page = browser.new_context(**options).new_page()
            page.goto(url)
            for _ in range(3):  # the last one's times are those of a server that is warm
                with page.expect_response("**/detect?*", timeout=PATIENCE_MS):
                    page.locator("#sample").click()
                page.locator('body[data-state="done"]').wait_for(timeout=PATIENCE_MS)
            page.locator("h1").hover()
            shot = page.screenshot(full_page="phone" not in name)
            pictures[name] = Image.open(io.BytesIO(shot)).convert("RGB")
        browser.close()
    return pictures


def webp(picture: Image.Image) -> bytes:
    """The picture as WebP, as good as MOST_BYTES allows."""
    content = b""
    for quality in range(90, 30, -10):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=quality, method=6)
        content = buffer.getvalue()
        if len(content) <= MOST_BYTES:
            break
    return content


if __name__ == "__main__":
    sys.exit(main())
