"""The stage with engines: batches of one canvas in, a row of results for each picture out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from bundle import Canvas, read_bundle
from deploy.ray.decode import unpack
from server.engine import Engine, RawDetections, run_engine
from server.errors import EngineFailed
from server.gate import open_proven
from server.isolate import EngineDied, infer_each
from server.malloc import tame_malloc
from server.metrics import Metrics
from server.options import DetectOptions, category_ids
from server.postprocess import postprocess
from server.preprocess import Pixels
from server.respond import convert_box
from server.runner import blank
from server.settings import Settings

DETECTION = pa.struct(
    [
        ("label", pa.string()),
        ("class_id", pa.int64()),
        ("score", pa.float32()),
        ("x0", pa.float32()),  # px of the picture as displayed, inside it
        ("y0", pa.float32()),
        ("x1", pa.float32()),
        ("y1", pa.float32()),
    ]
)
RESULT = pa.schema(
    [
        ("shard", pa.int32()),
        ("place", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("detections", pa.list_(DETECTION)),  # best first; null where there is an error
        ("error_code", pa.string()),
        ("error", pa.string()),
    ]
)

ENGINE_LOST = "engine_lost"
"""Code of a picture with which an engine was lost: no result, its shard is tried again."""


class Infer:
    """An engine of one's own: on the GPU that Ray gave this process, or on its CPUs."""

    def __init__(self, settings: Settings, options: DetectOptions) -> None:
        """Opens and proves the engine. Raises BundleError or StartupError."""
        tame_malloc()
        if "engine_niceness" not in settings.model_fields_set:  # the decoders beside it are other processes
            settings = settings.model_copy(update={"engine_niceness": 0})
        if settings.engine_threads == 0:
            cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
            settings = settings.model_copy(update={"engine_threads": max(1, int(cpus))})
        self._settings = settings
        self._options = options
        self._engine = self._open()
        self._wanted_ids = category_ids(options.classes, self._engine.manifest.categories)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows of BATCH to rows of RESULT."""
        results: list[dict[str, Any]] = []
        for number in range(rows.num_rows):
            row = {name: rows.column(name)[number] for name in rows.column_names}
            results += self._answer(row) if row["canvas"].is_valid else [_failed(row, 0, _said(row))]
        return pa.Table.from_pylist(results, RESULT)

    def _answer(self, row: dict[str, "pa.Scalar"]) -> list[dict[str, Any]]:
        images, canvas = unpack(row)
        results: list[dict[str, Any]] = []
        try:
            for part in infer_each(partial(self._infer, canvas), images, partial(blank, canvas)):
                for slot in range(part.slots.start, part.slots.stop):
                    if isinstance(part.answer, RawDetections):
                        results.append(self._found(row, slot, part.answer, slot - part.slots.start))
                    else:
                        results.append(_failed(row, slot, (EngineFailed.code, f"the engine failed: {part.answer}")))
        except EngineDied as error:
            self._engine.close()
            self._engine = self._open()
            results += [_failed(row, slot, (ENGINE_LOST, str(error))) for slot in range(len(results), len(images))]
        return results

    def _infer(self, canvas: Canvas, images: Sequence[Pixels]) -> RawDetections:
        return run_engine(self._engine, images, canvas)

    def _found(self, row: dict[str, "pa.Scalar"], slot: int, answer: RawDetections, of_answer: int) -> dict[str, Any]:
        width, height = row["pictures"].as_py()[2 * slot : 2 * slot + 2]
        found = postprocess(
            answer.of_slot(of_answer),
            width,
            height,
            self._engine.manifest.categories,
            threshold=self._options.threshold,
            max_detections=self._options.max_detections,
            wanted_ids=self._wanted_ids,
        )
        detections = [
            {"label": each.label, "class_id": each.class_id, "score": each.score}
            | dict(
                zip(
                    ("x0", "y0", "x1", "y1"),
                    convert_box(each.box_xyxy_px, "xyxy", "pixel", width, height),
                    strict=True,
                )
            )
            for each in found
        ]
        return {**_place(row, slot), "width": width, "height": height, "detections": detections}

    def _open(self) -> Engine:
        return open_proven(self._settings, read_bundle(self._settings.bundle), Metrics()).engine


def _place(row: dict[str, "pa.Scalar"], slot: int) -> dict[str, Any]:
    return {"shard": row["shard"].as_py(), "place": row["places"].as_py()[slot]}


def _failed(row: dict[str, "pa.Scalar"], slot: int, error: tuple[str, str]) -> dict[str, Any]:
    return {**_place(row, slot), "error_code": error[0], "error": error[1]}


def _said(row: dict[str, "pa.Scalar"]) -> tuple[str, str]:
    return row["error_code"].as_py(), row["error"].as_py()
