"""python -m samples --count 20 --output DIR"""

import argparse
import sys
from pathlib import Path

from samples.coco import write_smears


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m samples",
        description="Draw stained blood smears with their boxes: DIR/images/*.png and DIR/instances.json (COCO).",
        epilog="example: python -m samples --count 20 --output smears",
    )
    parser.add_argument("--count", type=int, default=20, help="how many smears (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, made if missing")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first smear (default %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="px (default %(default)s)")
    parser.add_argument("--width", type=int, default=640, help="px (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        path = write_smears(options.output, options.count, options.seed, options.height, options.width)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{options.count} smears, annotations in {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
