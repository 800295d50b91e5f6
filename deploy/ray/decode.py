"""The stage on CPUs: a shard's pictures read, decoded and resized, in batches of one canvas."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa

from bundle import Canvas, Manifest
from deploy.ray.plan import Shard
from deploy.ray.storage import Store
from server.decode import decode_pixels
from server.errors import ImageError
from server.headers import read_header
from server.preprocess import Pixels, preprocess

T = TypeVar("T")
U = TypeVar("U")

READERS = 16
"""Pictures of a shard that are fetched at once: an object store answers after tens of milliseconds."""

BATCH = pa.schema(
    [
        ("shard", pa.int32()),
        ("places", pa.list_(pa.int32())),  # in the shard
        ("pictures", pa.list_(pa.int32())),  # width and height of each as displayed, px
        ("canvas", pa.list_(pa.int32())),  # height and width; empty: nothing to infer
        ("filled", pa.list_(pa.int32())),  # height and width of each as resized
        ("pixels", pa.large_binary()),  # [h, w, 3] of each, end to end
        ("error_code", pa.string()),
        ("error", pa.string()),  # of a picture without pixels
    ]
)

UNREACHABLE = "unreachable"
"""Code of a picture that could not be fetched: no result, its shard is tried again."""


@dataclass
class _Filling:
    """Pictures of one canvas that wait for more."""

    places: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)


class Decode:
    """Shards in, batches out, each a row of BATCH. The same shard always gives the same rows in the same order."""

    def __init__(self, source: Store, manifest: Manifest, batch_size: int, max_image_pixels: int) -> None:
        self._source = source
        self._manifest = manifest
        self._batch_size = batch_size
        self._max_image_pixels = max_image_pixels

    def batches_of(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Of shards given as rows `number`, `first`, `paths`: what Ray Data calls."""
        for row in rows.to_pylist():
            yield from self.batches(Shard(row["number"], row["first"], tuple(row["paths"])))

    def batches(self, shard: Shard) -> Iterator[pa.Table]:
        """All pictures of a shard: full batches as soon as there are any, what is left over at the end."""
        filling: dict[Canvas, _Filling] = {}
        for place, fetched in enumerate(ahead(self._fetch, shard.paths, READERS)):
            if isinstance(fetched, bytes):
                try:
                    picture = decode_pixels(read_header(fetched, self._max_image_pixels))
                    pixels, canvas = preprocess(picture, self._manifest)
                except ImageError as error:
                    yield _without_pixels(shard, place, error.code, error.message)
                    continue
            else:
                yield _without_pixels(shard, place, *fetched)
                continue
            batch = filling.setdefault(canvas, _Filling())
            batch.places.append(place)
            batch.pictures += (picture.shape[1], picture.shape[0])
            batch.pixels.append(pixels)
            if len(batch.places) == self._batch_size:
                yield _row(shard, canvas, filling.pop(canvas))
        for canvas, batch in filling.items():
            yield _row(shard, canvas, batch)

    def _fetch(self, path: str) -> bytes | tuple[str, str]:
        """The file, or the code and words of an error."""
        try:
            return self._source.require(path)
        except FileNotFoundError:
            return "image_missing", "it was there when the run was planned, and is no more"
        except OSError as error:
            return UNREACHABLE, str(error)


def unpack(row: dict[str, "pa.Scalar"]) -> tuple[list[Pixels], Canvas]:
    """The pictures of a row of BATCH, each [h, w, 3], and their canvas; a copy is made of none."""
    height, width = row["canvas"].as_py()
    buffer = np.frombuffer(row["pixels"].as_buffer(), np.uint8)
    images, start = [], 0
    filled = row["filled"].as_py()
    for h, w in zip(filled[::2], filled[1::2], strict=True):
        images.append(buffer[start : start + h * w * 3].reshape(h, w, 3))
        start += h * w * 3
    return images, Canvas(height=height, width=width)


def ahead(work: Callable[[T], U], items: Iterable[T], many: int) -> Iterator[U]:
    """`map` by threads, in order, never more than `many` items ahead of what is taken."""
    with ThreadPoolExecutor(many) as threads:
        begun: deque[Future[U]] = deque()
        for item in items:
            begun.append(threads.submit(work, item))
            if len(begun) == many:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _row(shard: Shard, canvas: Canvas, batch: _Filling) -> pa.Table:
    content = {
        "shard": shard.number,
        "places": batch.places,
        "pictures": batch.pictures,
        "canvas": [canvas.height, canvas.width],
        "filled": [side for pixels in batch.pixels for side in pixels.shape[:2]],
        "pixels": b"".join(np.ascontiguousarray(pixels).data for pixels in batch.pixels),
    }
    return pa.Table.from_pylist([content], BATCH)


def _without_pixels(shard: Shard, place: int, code: str, message: str) -> pa.Table:
    content = {"shard": shard.number, "places": [place], "error_code": code, "error": message}
    return pa.Table.from_pylist([content], BATCH)
