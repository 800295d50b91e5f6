"""What a batch run writes: a Parquet file a shard, and a COCO dataset over all of them."""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bundle import Manifest
from deploy.ray.decode import UNREACHABLE
from deploy.ray.infer import DETECTION, ENGINE_LOST
from deploy.ray.plan import Plan, Shard
from deploy.ray.storage import Store
from server.respond import convert_box, error_content

NO_RESULT = pa.array([UNREACHABLE, ENGINE_LOST])
"""Errors that another try may mend: no shard is written with one."""

ROW = pa.schema(
    [
        ("image_id", pa.int64()),  # its place among all pictures of the run
        ("path", pa.string()),  # from the input
        ("width", pa.int32()),  # of the picture as displayed, px
        ("height", pa.int32()),
        ("detections", pa.list_(DETECTION)),  # best first; null where there is an error
        ("error_code", pa.string()),
        ("error", pa.string()),
    ]
)


class Gather:
    """Takes results as they come and writes each shard when all of it is there."""

    def __init__(self, output: Store, shards: Sequence[Shard]) -> None:
        self._output = output
        self._shards = {shard.number: shard for shard in shards}
        self._parts: dict[int, dict[int, pa.Table]] = {}  # shard, place -> a row
        self.failed: dict[int, str] = {}
        """Shards that were not written for an error that another try may mend, and the first such error."""

    def take(self, results: pa.Table) -> Iterator[Shard]:
        """Rows of RESULT; gives the shards that are written now."""
        for number in pc.unique(results.column("shard")).to_pylist():
            of_shard = results.filter(pc.equal(results.column("shard"), number))
            parts = self._parts.setdefault(number, {})
            for index, place in enumerate(of_shard.column("place").to_pylist()):
                parts[place] = of_shard.slice(index, 1)  # one that comes twice takes its own place
            if len(parts) == len(self._shards[number].paths):
                shard = self._shards[number]
                del self._parts[number]
                if self._write(shard, pa.concat_tables([parts[place] for place in range(len(shard.paths))])):
                    yield shard

    def _write(self, shard: Shard, rows: pa.Table) -> bool:
        mendable = rows.filter(pc.is_in(rows.column("error_code"), NO_RESULT))
        if mendable.num_rows:
            first = mendable.slice(0, 1).to_pylist()[0]
            self.failed[shard.number] = f"{shard.paths[first['place']]}: {first['error_code']}: {first['error']}"
            return False
        columns = {
            "image_id": pa.array(range(shard.first, shard.first + len(shard.paths)), pa.int64()),
            "path": pa.array(shard.paths),
            **{name: rows.column(name) for name in ROW.names[2:]},
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, ROW), sink, compression="zstd")
        self._output.write(shard.file_name, sink.getvalue())
        return True


def read_rows(output: Store, plan: Plan) -> Iterator[dict[str, Any]]:
    """Every picture's row, in order of id. Raises OSError where a shard is missing."""
    for shard in plan.shards():
        yield from pq.read_table(pa.BufferReader(output.require(shard.file_name))).to_pylist()


def write_coco(file: BinaryIO, output: Store, plan: Plan, manifest: Manifest) -> None:
    """A COCO dataset with scores, of the form of POST /detect?format=coco; one shard at a time is in memory."""
    categories = [{"id": number, "name": name} for number, name in manifest.categories.items()]
    file.write(b'{"categories":' + orjson.dumps(categories) + b',"images":[')
    for row in read_rows(output, plan):
        image = {"id": row["image_id"], "file_name": row["path"]}
        if row["error_code"] is None:
            image |= {"width": row["width"], "height": row["height"]}
        else:
            image |= error_content(row["error_code"], row["error"])
        file.write((b",\n" if row["image_id"] else b"\n") + orjson.dumps(image))
    file.write(b'],\n"annotations":[')
    number = 0
    for row in read_rows(output, plan):
        for found in row["detections"] or ():
            corners = (found["x0"], found["y0"], found["x1"], found["y1"])
            box = convert_box(corners, "xywh", "pixel", row["width"], row["height"])
            annotation = {
                "id": number + 1,
                "image_id": row["image_id"],
                "category_id": found["class_id"],
                "bbox": box,
                "area": round(box[2] * box[3], 3),
                "iscrowd": 0,
                "score": round(found["score"], 6),
            }
            file.write((b",\n" if number else b"\n") + orjson.dumps(annotation))
            number += 1
    file.write(b"]}\n")
