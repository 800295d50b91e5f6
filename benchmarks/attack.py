"""What was attacked, and what it answered: `python -m benchmarks.attack` prints a table in Markdown.

With `--large` the table is of good pictures of 49 megapixels, one by one and eight at once.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from benchmarks.machine import machine
from tests.server.hostile import ATTACKS, Attack
from tests.server.pictures import encode
from tests.server.siege import Result, Siege

SIDE = 7000
LARGE_BODY_BYTES = 32 << 20  # more than by default


def large_pictures() -> list[Attack]:
    """Good pictures just below the limit of pixels, in every format, and the slowest of their kind."""
    coarse = np.random.default_rng(0).integers(0, 255, (SIDE // 50, SIDE // 50, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.fromarray(coarse[..., 0]).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    grey = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    files = {
        "JPEG": encode(picture, "JPEG", quality=75),
        "JPEG, progressive 4:4:4": encode(picture, "JPEG", quality=75, progressive=True, subsampling=0),
        "JPEG, CMYK": encode(picture.convert("CMYK"), "JPEG", quality=75),
        "PNG": encode(picture, compress_level=3),
        "PNG, transparent": encode(alpha, compress_level=3),
        "PNG, 16 bits": encode(grey, compress_level=3),
        "WebP": encode(picture, "WEBP", quality=50, method=0),
        "WebP, lossless": encode(picture, "WEBP", lossless=True, method=0, quality=0),
        "WebP, lossless and transparent": encode(alpha, "WEBP", lossless=True, method=0, quality=0),
        "TIFF, deflated": encode(picture, "TIFF", compression="tiff_adobe_deflate"),
    }
    return [
        Attack(f"{name}, {len(data) / 1e6:.1f} MB", 200, "", lambda data=data: data) for name, data in files.items()
    ]


def all_at_once(siege: Siege, attacks: Sequence[Attack]) -> list[Result]:
    """Each attack by a client of its own, all begun together; memory is that of all of them."""
    with ThreadPoolExecutor(len(attacks)) as pool:
        return [*pool.map(siege.attack, attacks)]


def main() -> int:
    """Every attack once; 1 if one is answered otherwise than it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    parser.add_argument("--large", action="store_true", help="good pictures of 49 megapixels instead")
    arguments = parser.parse_args()
    attacks: Sequence[Attack] = large_pictures() if arguments.large else ATTACKS
    wrong = 0
    with Siege(LARGE_BODY_BYTES if arguments.large else None) as siege:
        print(machine())
        print(f"A neighbour's normal request with nobody else there: {siege.calm_ms():.1f} ms (median).\n")
        print("| attack | answer | code | ms | memory, MB | neighbour at worst, ms |")
        print("|---|---|---|---|---|---|")
        for attack in attacks:
            if arguments.only not in attack.name:
                continue
            result = siege.attack(attack)
            right = (result.status, result.code) == (attack.status, attack.code)
            wrong += not right
            name = attack.name if right else f"{attack.name} (**expected {attack.status} {attack.code}**)"
            print(
                f"| {name.replace('|', ' ')} | {result.status} | {result.code} | {result.ms:.0f} "
                f"| {max(0.0, result.growth_mb):.0f} | {result.neighbour_ms:.0f} |",
                flush=True,
            )
        if arguments.large:
            crowd = [*attacks[:4], *attacks[6:10]]
            results = all_at_once(siege, crowd)
            print(
                f"| {len(crowd)} of them at once | {', '.join(str(result.status) for result in results)} | "
                f"| {max(result.ms for result in results):.0f} | {max(result.growth_mb for result in results):.0f} "
                f"| {max(result.neighbour_ms for result in results):.0f} |"
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
