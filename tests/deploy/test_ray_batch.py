"""A batch run on a real Ray with two engines, some of whose processes are killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray", reason="ray is not installed: make ray")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: make ray")

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.exceptions import ExecutionTimeoutError

from benchmarks.ray_serving import ray_environment
from bundle import Bundle
from deploy.ray.batch import asked, parser, run
from deploy.ray.decode import BATCH, UNREACHABLE, Decode, ahead, unpack
from deploy.ray.infer import ENGINE_LOST, RESULT, Infer
from deploy.ray.plan import Plan, PlanMismatch, Shard, open_plan
from deploy.ray.results import Gather
from deploy.ray.storage import Store
from server.detect import detect_picture
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.options import DetectOptions
from server.settings import Settings
from tests.deploy.processes import ROOT, descendants, running, wait_for
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import poison
from tests.server.tiny_bundle import LABEL, write_tiny_bundle

COUNT, SHARD = 400, 10
RUN_S = 240.0  # a run takes some ten seconds; a slow machine under load much longer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def draw(folder: Path, count: int) -> list[str]:
    """`count` pictures for two canvases, in folders; each with a bright box of its own."""
    names = []
    for number in range(count):
        height, width = (48, 64) if number % 3 else (64, 48)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[5 + number % 7 : 20 + number % 9, 4 + number % 11 : 30] = 255
        path = folder / f"{number % 4}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        names.append(str(path.relative_to(folder)))
    return sorted(names)


def command(folder: Path, bundle: Bundle, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "deploy.ray.batch", "--bundle", str(bundle.path)),
        *("--input", str(folder / "pictures"), "--output", str(folder / "found"), "--shard-images", str(SHARD)),
        *("--engines", "2", "--engine-cpus", "0.5", "--decode-cpus", "0.5"),
        *more,
    ]


def start(folder: Path, bundle: Bundle, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, bundle, *more),
        cwd=ROOT,
        env=ray_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "found" / "shards").glob("part-*.parquet"))


def engines(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, name in descendants(process.pid).items() if name.startswith("ray::MapWorker(MapBatches(Infer")]


def check_all_written_once(folder: Path, names: list[str], bundle: Bundle) -> None:
    rows = [row for part in parts(folder) for row in pq.read_table(part).to_pylist()]
    assert [row["path"] for row in rows] == names, "every picture once, in order"
    assert [row["image_id"] for row in rows] == list(range(len(names)))
    engine = OnnxRuntimeEngine(bundle, Settings(device="cpu", engine_threads=1))
    for row in rows[:: len(rows) // 20]:
        data = (folder / "pictures" / row["path"]).read_bytes()
        expected = detect_picture(engine, data, DetectOptions(threshold=0.05), 10**6).detections
        found = [(each["class_id"], each["x0"], each["y0"], each["x1"], each["y1"]) for each in row["detections"]]
        assert [each[0] for each in found] == [LABEL] == [each.class_id for each in expected]
        assert found[0][1:] == pytest.approx(expected[0].box_xyxy_px, abs=1e-3)


@pytest.mark.timeout(2 * RUN_S)
def test_a_killed_engine_loses_nothing_and_doubles_nothing(tmp_path: Path, bundle: Bundle) -> None:
    names = draw(tmp_path / "pictures", COUNT)
    with running(start(tmp_path, bundle)) as process:
        wait_for(lambda: len(parts(tmp_path)) >= 5 and len(engines(process)) == 2, RUN_S, "five shards")
        victim = engines(process)[0]
        os.kill(victim, signal.SIGKILL)
        written = len(parts(tmp_path))
        said, _ = process.communicate(timeout=RUN_S)
    assert written < COUNT // SHARD, "the kill came too late to prove anything"
    assert process.returncode == 0, said
    assert f"all {COUNT} pictures are written, each once: {COUNT} answered" in said
    check_all_written_once(tmp_path, names, bundle)


@pytest.mark.timeout(3 * RUN_S)
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, bundle: Bundle) -> None:
    names = draw(tmp_path / "pictures", COUNT)
    with running(start(tmp_path, bundle)) as process:
        wait_for(lambda: len(parts(tmp_path)) >= 5, RUN_S, "five shards")
        process.kill()
        process.wait()
    before = {part: part.stat().st_mtime_ns for part in parts(tmp_path)}
    assert 5 <= len(before) < COUNT // SHARD

    again = subprocess.run(
        command(tmp_path, bundle, "--format", "coco"),
        cwd=ROOT,
        env=ray_environment(),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert f"{COUNT} pictures in {COUNT // SHARD} shards, {len(before)} of them written" in again.stdout
    assert all(part.stat().st_mtime_ns == moment for part, moment in before.items()), "what is done is not done again"
    check_all_written_once(tmp_path, names, bundle)

    coco = json.loads((tmp_path / "found" / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == names
    assert [each["id"] for each in coco["annotations"]] == list(range(1, COUNT + 1))
    assert {each["image_id"] for each in coco["annotations"]} == set(range(COUNT))
    assert coco["annotations"][0].keys() == {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "score"}


def shard_of(names: list[str]) -> Shard:
    return Shard(0, 0, tuple(names))


def test_batches_have_one_canvas_and_come_in_the_same_order_every_time(tmp_path: Path, bundle: Bundle) -> None:
    names = draw(tmp_path, 20)
    decode = Decode(Store(str(tmp_path)), bundle.manifest, 4, 10**6)
    tables = list(decode.batches(shard_of(names)))
    assert all(table.schema == BATCH for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(place for row in rows for place in row["places"]) == list(range(20))
    sizes = {tuple(row["canvas"]): [] for row in rows}
    for row in rows:
        sizes[tuple(row["canvas"])].append(len(row["places"]))
    assert len(sizes) == 2
    assert all(size == 4 for of_canvas in sizes.values() for size in of_canvas[:-1]), "full until the shard ends"
    again = pa.concat_tables(decode.batches(shard_of(names)))
    assert again == pa.concat_tables(tables), "a task whose worker was lost is run again"


def test_a_row_holds_the_pixels_as_they_were(tmp_path: Path, bundle: Bundle) -> None:
    (name,) = draw(tmp_path, 1)
    (table,) = Decode(Store(str(tmp_path)), bundle.manifest, 4, 10**6).batches(shard_of([name]))
    (pixels,), canvas = unpack({column: table.column(column)[0] for column in table.column_names})
    assert canvas in bundle.manifest.canvases
    assert pixels.shape[0] <= canvas.height
    assert pixels.shape[1] <= canvas.width
    assert {0, 255} <= set(np.unique(pixels).tolist())


def test_what_cannot_be_read_has_a_row_that_says_why(tmp_path: Path, bundle: Bundle) -> None:
    names = draw(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tables = Decode(Store(str(tmp_path)), bundle.manifest, 4, 10**6).batches(
        shard_of(["broken.png", "gone.png", *names])
    )
    rows = pa.concat_tables(tables).to_pylist()
    assert [(row["places"], row["error_code"]) for row in rows] == [
        ([0], "image_unreadable"),
        ([1], "image_missing"),
        ([2], None),
    ]


def results(*rows: tuple[int, int, str | None]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"shard": shard, "place": place, "width": 1, "height": 1, "detections": [], "error_code": code}
            for shard, place, code in rows
        ],
        RESULT,
    )


def test_a_shard_is_written_when_all_of_it_is_there_and_a_row_that_comes_twice_counts_once(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    shards = list(Plan(["a.png", "b.png", "c.png"], 2).shards())
    gather = Gather(output, shards)
    assert list(gather.take(results((0, 1, None), (0, 1, None), (1, 0, None)))) == [shards[1]]
    assert list(gather.take(results((0, 0, None)))) == [shards[0]]
    rows = pq.read_table(tmp_path / shards[0].file_name).to_pylist()
    assert [(row["image_id"], row["path"]) for row in rows] == [(0, "a.png"), (1, "b.png")]
    assert Plan(["a.png", "b.png", "c.png"], 2).pending(output) == []


def test_a_shard_with_a_picture_that_could_not_be_fetched_is_not_written(tmp_path: Path) -> None:
    output, plan = Store(str(tmp_path)), Plan(["a.png", "b.png", "c.png"], 2)
    gather = Gather(output, list(plan.shards()))
    written = list(gather.take(results((0, 0, None), (0, 1, UNREACHABLE), (1, 0, "image_unreadable"))))
    assert [shard.number for shard in written] == [1], "an unreadable picture is a result"
    assert [shard.number for shard in plan.pending(output)] == [0]
    assert gather.failed[0].startswith("b.png: unreachable")


def test_a_file_that_is_not_whole_is_no_result(tmp_path: Path) -> None:
    output, plan = Store(str(tmp_path)), Plan(["a.png"], 1)
    shard = next(plan.shards())
    path = tmp_path / shard.file_name
    path.parent.mkdir()
    path.with_name(f"{path.name}.123.partial").write_bytes(b"half")
    assert plan.pending(output) == [shard]


def test_a_run_goes_on_only_with_the_same_question(tmp_path: Path) -> None:
    draw(tmp_path / "pictures", 3)
    source, output = Store(str(tmp_path / "pictures")), Store(str(tmp_path / "found"))
    plan = open_plan(source, output, {"threshold": 0.5}, 2)
    draw(tmp_path / "pictures", 5)
    assert open_plan(source, output, {"threshold": 0.5}, 2) == plan, "planned once: ids do not move"
    with pytest.raises(PlanMismatch, match=r"holds a run with threshold 0\.5, and this one has 0\.3"):
        open_plan(source, output, {"threshold": 0.3}, 2)


@pytest.mark.parametrize("other", [{"precision": "int8"}, {"engine": "onnxruntime"}])
def test_a_run_goes_on_only_with_the_same_engine_and_precision(
    tmp_path: Path, bundle: Bundle, other: dict[str, Any]
) -> None:
    draw(tmp_path / "pictures", 1)
    source, output = Store(str(tmp_path / "pictures")), Store(str(tmp_path / "found"))
    args = parser().parse_args(["--input", "pictures", "--output", "found"])
    options = DetectOptions(threshold=0.05)
    open_plan(source, output, asked(args, Settings(bundle=bundle.path), options, bundle), 2)
    with pytest.raises(PlanMismatch, match=f"holds a run with {next(iter(other))} 'auto'"):
        open_plan(source, output, asked(args, Settings(bundle=bundle.path, **other), options, bundle), 2)


def test_an_input_without_pictures_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*\.jpg"):
        open_plan(Store(str(tmp_path)), Store(str(tmp_path / "found")), {}, 2)


def test_fetching_keeps_order_and_never_runs_far_ahead() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return -item

    taken = ahead(work, range(100), 4)
    assert next(taken) == 0
    assert len(begun) <= 5
    assert list(taken) == [-item for item in range(1, 100)]


@dataclass
class Engines:
    """What opens engines for `Infer`: fake ones, with trouble as given."""

    troubles: list[str | None]
    opened: list[FakeEngine] = field(default_factory=list)

    def __call__(self, *_: object) -> Engines:
        self.engine = FakeEngine()
        self.engine.trouble = self.troubles.pop(0)
        self.opened.append(self.engine)
        return self


def infer(folder: Path, bundle: Bundle, engines: Engines, monkeypatch: pytest.MonkeyPatch, size: int = 4) -> list[Any]:
    """Rows for all pictures in `folder`, in the order of their places."""
    monkeypatch.setattr("deploy.ray.infer.open_proven", engines)
    worker = Infer(Settings(bundle=bundle.path, engine_threads=1), DetectOptions(threshold=0.5))
    names = sorted(path.name for path in folder.iterdir())
    batches = Decode(Store(str(folder)), bundle.manifest, size, 10**6).batches(shard_of(names))
    rows = [row for batch in batches for row in worker(batch).to_pylist()]
    return sorted(rows, key=lambda row: row["place"])


def test_a_picture_that_the_engine_cannot_take_fails_alone(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "drawn", 2)
    folder = tmp_path / "all"
    folder.mkdir()
    for number, path in enumerate(sorted((tmp_path / "drawn").rglob("*.png"))):
        path.rename(folder / f"{number}.png")
    (folder / "9.png").write_bytes(poison())
    rows = infer(folder, bundle, Engines([None]), monkeypatch)
    assert [row["error_code"] for row in rows] == [None, None, "engine_failed"]
    assert all(row["detections"] for row in rows[:2])
    assert rows[2]["detections"] is None


def test_an_engine_that_is_lost_is_opened_again_and_its_pictures_have_no_result(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "drawn", 1)
    engines = Engines(["raise", None])
    rows = infer(tmp_path / "drawn" / "0", bundle, engines, monkeypatch)
    assert [row["error_code"] for row in rows] == [ENGINE_LOST]
    assert [engine.closed for engine in engines.opened] == [True, False]
    shard = shard_of(["00000.png"])
    gather = Gather(Store(str(tmp_path)), [shard])
    assert list(gather.take(pa.Table.from_pylist(rows, RESULT))) == []
    assert ENGINE_LOST in gather.failed[0]


def test_a_picture_that_ends_every_worker_holds_a_run_up_for_so_long_and_its_shard_is_named(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "pictures", 3)
    asked: list[list[int]] = []

    class Endless:
        def __init__(self, shards: list[Shard]) -> None:
            asked.append([shard.number for shard in shards])

        def iter_batches(self, **_: object) -> Iterator[pa.Table]:
            if len(asked) == 1:
                yield results((0, 0, None))
            raise ExecutionTimeoutError("no progress")

    monkeypatch.setattr("deploy.ray.batch.dataset", lambda *given: Endless(given[-1]))
    words = ["--input", str(tmp_path / "pictures"), "--output", str(tmp_path / "found"), "--shard-images", "1"]
    args = parser().parse_args([*words, "--bundle", str(bundle.path)])
    assert run(args, Settings(bundle=bundle.path), DetectOptions(threshold=0.05), bundle) == 1
    assert asked == [[0, 1, 2], [1, 2], [1, 2]], "what is written is not done again"
    said = capsys.readouterr().err
    assert "shard 1 is not done after 3 tries" in said
    assert "2 of 3 shards are missing; the same command tries them again" in said
