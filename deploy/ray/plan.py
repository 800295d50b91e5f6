"""What a batch run is to do: its pictures in shards, fixed once and written beside the results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.ray.storage import Store
from server.detect import SUFFIXES

LISTING, PLAN, SHARDS = "pictures.parquet", "run.json", "shards"
FORMAT = 1


class PlanMismatch(Exception):
    """The output holds another run; the message names what differs."""


@dataclass(frozen=True)
class Shard:
    """Pictures whose results go into one file."""

    number: int
    first: int  # the id of its first picture; ids count on from there
    paths: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Of its results."""
        return f"{SHARDS}/part-{self.number:06d}.parquet"


@dataclass(frozen=True)
class Plan:
    """All pictures of a run in their order; a picture's id is its place."""

    paths: Sequence[str]  # below the input
    shard_images: int

    def __len__(self) -> int:
        return -(-len(self.paths) // self.shard_images)

    def shards(self) -> Iterator[Shard]:
        """All of them, in order."""
        for number, first in enumerate(range(0, len(self.paths), self.shard_images)):
            yield Shard(number, first, tuple(self.paths[first : first + self.shard_images]))

    def pending(self, output: Store) -> list[Shard]:
        """Those without a file of results: what is done is known from what is written, and from nothing else."""
        written = set(output.names(SHARDS))
        return [shard for shard in self.shards() if PurePosixPath(shard.file_name).name not in written]


def open_plan(source: Store, output: Store, asked: dict[str, Any], shard_images: int) -> Plan:
    """The plan that `output` holds, or a new one over all pictures in `source`, written there.

    `asked` is what results depend on: options, bundle, input. A run that goes on must be asked for the same. Raises
    PlanMismatch, and FileNotFoundError where there are no pictures.
    """
    content = {"format": FORMAT, **asked, "shard_images": shard_images}
    if (found := output.read(PLAN)) is not None:
        for name, value in (kept := orjson.loads(found)).items():
            if name != "images" and content.get(name) != value:
                raise PlanMismatch(
                    f"{output} holds a run with {name} {value!r}, and this one has {content.get(name)!r}: "
                    "ask for the same, or take another output"
                )
        listing = pq.read_table(pa.BufferReader(output.require(LISTING)))
        paths = listing.column("path").to_pylist()
        if len(paths) != kept["images"]:
            raise PlanMismatch(
                f"{output}/{LISTING} names {len(paths)} pictures, {PLAN} {kept['images']}: it is damaged"
            )
        return Plan(paths, shard_images)
    paths = sorted(name for name in source.walk() if PurePosixPath(name).suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no pictures in {source}: none of its files ends in {', '.join(sorted(SUFFIXES))}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"path": paths}), sink, compression="zstd")
    output.write(LISTING, sink.getvalue())
    # Last: from here on the run exists.
    output.write(PLAN, orjson.dumps(content | {"images": len(paths)}, option=orjson.OPT_INDENT_2))
    return Plan(paths, shard_images)
