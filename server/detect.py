"""Detection without HTTP: the same way, one picture after the other. `ddetr detect` stands on it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle import read_bundle
from server.decode import decode_pixels
from server.engine import Engine, run_engine
from server.engine import open_engine as open_one
from server.errors import EngineFailed, ImageError
from server.headers import read_header
from server.options import DetectOptions, category_ids
from server.postprocess import postprocess
from server.preprocess import preprocess
from server.respond import ImageAnswer, Outcome
from server.settings import Settings
from server.timing import StageTimes

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class FileOutcome:
    """A file, and what was found in it or why nothing can be."""

    path: Path
    outcome: Outcome


def open_engine(settings: Settings) -> Engine:
    """The engine for the settings' bundle. Raises BundleError or StartupError."""
    alone = {"engine_instances": 1, "engine_niceness": 0}
    return open_one(settings.model_copy(update=alone), read_bundle(settings.bundle))


def detect_picture(engine: Engine, data: bytes, options: DetectOptions, max_image_pixels: int) -> ImageAnswer:
    """What `engine` finds in the image file `data`.

    Raises ImageError, EngineFailed, or BadParameter for unknown classes.
    """
    manifest = engine.manifest
    wanted_ids = category_ids(options.classes, manifest.categories)
    marks_s = [time.monotonic()]
    picture = decode_pixels(read_header(data, max_image_pixels))
    height, width, _ = picture.shape
    marks_s.append(time.monotonic())
    pixels, canvas = preprocess(picture, manifest)
    marks_s.append(time.monotonic())
    try:
        raw = run_engine(engine, [pixels], canvas).of_slot(0)
    except Exception as error:
        raise EngineFailed(f"the engine failed on this image: {type(error).__name__}: {error}") from error
    marks_s.append(time.monotonic())
    detections = postprocess(
        raw,
        width,
        height,
        manifest.categories,
        threshold=options.threshold,
        max_detections=options.max_detections,
        wanted_ids=wanted_ids,
    )
    marks_s.append(time.monotonic())
    decode_ms, preprocess_ms, inference_ms, postprocess_ms = (
        (end - start) * 1e3 for start, end in zip(marks_s, marks_s[1:], strict=False)
    )
    times = StageTimes(decode=decode_ms, preprocess=preprocess_ms, inference=inference_ms, postprocess=postprocess_ms)
    return ImageAnswer(width, height, detections, times)


def detect_files(
    engine: Engine, paths: Iterable[Path], options: DetectOptions, max_image_pixels: int
) -> Iterator[FileOutcome]:
    """The outcome of every file, as it is there. A file without an answer does not end the run."""
    for path in paths:
        try:
            yield FileOutcome(path, detect_picture(engine, path.read_bytes(), options, max_image_pixels))
        except (ImageError, EngineFailed) as error:
            yield FileOutcome(path, error)
        except OSError as error:
            yield FileOutcome(path, ImageError(f"cannot be opened: {error.strerror}"))


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` as they are, and for folders all pictures in them (by suffix), in order of name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        else:
            found.append(path)
    return found
