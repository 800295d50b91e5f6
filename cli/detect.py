"""`ddetr detect`: pictures from files and folders; JSON, or the pictures with their boxes, out."""

from __future__ import annotations

import argparse
import glob
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
from pydantic import ValidationError

from bundle import BundleError
from server.decode import decode
from server.detect import FileOutcome, detect_files, find_pictures, open_engine
from server.draw import draw_detections, encode_png
from server.engine import Engine
from server.errors import BadParameter, ServiceError, StartupError
from server.options import DetectOptions, category_ids, parse_options
from server.respond import coco_body, image_content
from server.settings import Settings

EXIT_FAILED = 1

# `format` is this command's own: it has JSON lines, and pictures are --draw.
SHARED_OPTIONS = [name for name in DetectOptions.model_fields if name != "format"]

DESCRIPTION = """\
Detect in pictures: files, folders (with all pictures below them) or quoted patterns.

JSON goes to standard output, in the form of POST /detect's answer with the name of each file. A file without an answer
has an error in its place, and the exit status is then 1."""

EXAMPLE = """\
example:
  ddetr detect smear.jpg --threshold 0.4
  ddetr detect smears/ --classes WBC,Platelets --format jsonl > found.jsonl
  ddetr detect 'smears/*.png' --draw drawn/
"""


def run(argv: Sequence[str]) -> int:
    """Detect in every picture named; 1 if one of them has no answer."""
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    try:
        options = read_options(arguments)
        settings = Settings() if arguments.bundle is None else Settings(bundle=arguments.bundle)
        paths = find_pictures(expand(arguments.paths))
        if not paths:
            parser.error(f"no pictures in {', '.join(arguments.paths)}")
        if arguments.draw is not None:
            make_folder(arguments.draw)
        engine = open_engine(settings)
        try:
            category_ids(options.classes, engine.manifest.categories)
            outcomes = detect_files(engine, paths, options, settings.max_image_pixels)
            if arguments.draw is not None:
                unread = write_drawn(outcomes, arguments.draw, paths, settings.max_image_pixels)
            else:
                unread = write_json(outcomes, arguments.format, engine, options)
        finally:
            engine.close()
    except (BadParameter, ValidationError) as error:
        parser.error(str(error))
    except (BundleError, StartupError, OSError) as error:
        print(f"ddetr detect: {error}", file=sys.stderr)
        return EXIT_FAILED
    if unread:
        print(f"ddetr detect: {unread} of {len(paths)} files have no answer", file=sys.stderr)
        return EXIT_FAILED
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """The flags; those that /detect knows as query parameters are made from the same fields."""
    parser = argparse.ArgumentParser(
        prog="ddetr detect",
        usage="ddetr detect PATH ... [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="picture, folder of pictures, or quoted pattern")
    parser.add_argument("--bundle", type=Path, metavar="PATH", help="folder of the bundle (default: embedded bundle)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--format",
        choices=("json", "jsonl", "coco"),
        default="json",
        help="one document, a line for each picture as it is done, or a COCO dataset with scores (default: json)",
    )
    output.add_argument("--draw", type=Path, metavar="DIR", help="write the pictures with their boxes here, no JSON")
    for name in SHARED_OPTIONS:
        field = DetectOptions.model_fields[name]
        default = "all" if field.default is None else field.default
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="VALUE", help=f"{field.description} (default: {default})"
        )
    return parser


def read_options(arguments: argparse.Namespace) -> DetectOptions:
    """The options that were given. Raises BadParameter naming option and value."""
    given = [(name, value) for name in SHARED_OPTIONS if (value := getattr(arguments, name)) is not None]
    return parse_options([*given, ("format", "coco" if arguments.format == "coco" else "json")])


def expand(paths: Sequence[str]) -> list[Path]:
    """Patterns that the shell left alone, resolved; what matches nothing stays, to be reported by its name."""
    expanded: list[Path] = []
    for path in paths:
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).exists() else []
        expanded += [Path(match) for match in matches or [path]]
    return expanded


def write_json(outcomes: Iterator[FileOutcome], form: str, engine: Engine, options: DetectOptions) -> int:
    """Write to stdout in the form `json`, `jsonl` or `coco`; the number of files without an answer."""
    unread = 0
    files: list[FileOutcome] = []
    for file in outcomes:
        unread += isinstance(file.outcome, ServiceError)
        if form == "jsonl":
            print(orjson.dumps(file_content(file, options)).decode(), flush=True)
        else:
            files.append(file)
    manifest = engine.manifest
    if form == "coco":
        names = [str(file.path) for file in files]
        print(coco_body([file.outcome for file in files], manifest.categories, names).decode())
    elif form == "json":
        content = {
            "model": {"name": manifest.model.name, "version": manifest.model.version},
            "images": [file_content(file, options) for file in files],
        }
        print(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())
    return unread


def file_content(file: FileOutcome, options: DetectOptions) -> dict[str, object]:
    """One file's part of the answer: its name, then what /detect says of an image."""
    return {"file": str(file.path), **image_content(file.outcome, options)}


def write_drawn(outcomes: Iterator[FileOutcome], folder: Path, inputs: Sequence[Path], max_image_pixels: int) -> int:
    """Write each picture with its boxes into `folder`, the files of format=image; the number without an answer."""
    taken = {path.resolve() for path in inputs}
    unread = 0
    for file in outcomes:
        if isinstance(file.outcome, ServiceError):
            print(f"{file.path}: {file.outcome.message}", file=sys.stderr)
            unread += 1
            continue
        target = free_name(folder, file.path.stem, taken)
        picture = decode(file.path.read_bytes(), max_image_pixels)
        target.write_bytes(encode_png(draw_detections(picture, file.outcome.detections)))
        print(f"{file.path} -> {target}: {len(file.outcome.detections)} detections", flush=True)
    return unread


def make_folder(folder: Path) -> None:
    """Raises OSError, naming the folder, where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--draw: cannot write to {folder}: {error.strerror}") from error


def free_name(folder: Path, stem: str, taken: set[Path]) -> Path:
    """`folder/stem.png`, or with a number where that is an input or was written in this run. Adds it to `taken`."""
    number = 1
    while True:
        target = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if target.resolve() not in taken:
            taken.add(target.resolve())
            return target
        number += 1
