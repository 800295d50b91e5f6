"""`ddetr export --int8`: what it writes, what it refuses, and that nothing else of the bundle changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import plugins
from benchmarks.corruptions import run
from bundle import HashMismatch, embedded_bundle, read_bundle
from bundle.reader import MANIFEST_FILE, PROOF_FILE, sha256_of
from cli.main import main
from cli.quantise import INT8_FILE
from cli.verify_data import Comparison
from parity import LIMITS, limits_for, read_proof, run_gate
from samples.coco import write_smears
from server.preprocess import lay_on_canvas, preprocess
from tests.export.conftest import Exported
from tests.export.small import CATEGORY_IDS
from training.coco import read_pixels, read_split

LIBRARY = plugins.onnxruntime_library()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn smears whose cells are of the small networks' categories: eight to take ranges from, four to measure."""
    folder = tmp_path_factory.mktemp("smears")
    for part, count, seed in (("train", 8, 0), ("val", 4, 100)):
        document = json.loads(write_smears(folder, count, seed, height=120, width=160).read_text())
        for entry in document["annotations"]:
            entry["category_id"] = CATEGORY_IDS[entry["category_id"] - 1]
        for number, category in enumerate(document["categories"]):
            category["id"] = CATEGORY_IDS[number]
        (folder / f"instances_{part}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def folder(exported: Callable[[str], Exported], tmp_path: Path) -> Path:
    """A copy of the small network's bundle, without its proof."""
    folder = shutil.copytree(exported("r50-two-stage").bundle.path, tmp_path / "bundle")
    (folder / PROOF_FILE).unlink()
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["hashes"]["proof"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


def export(*arguments: str | Path) -> int:
    return main(["export", "--int8", "--threads", "1", *map(str, arguments)])


def test_the_bundle_gets_the_graph_and_its_record(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "README.md").write_text("card")
    before = read_bundle(folder)
    assert before.int8_path is None
    assert export("--bundle", folder, "--data", data, "--calibration-pictures", "6") == 0
    after = read_bundle(folder)
    assert after.int8_path == folder / INT8_FILE
    record = after.manifest.int8
    assert record is not None
    assert record.of == before.manifest.hashes["onnx"] == sha256_of(folder / "model.onnx")
    assert record.sha256 == sha256_of(folder / INT8_FILE)
    assert (record.pictures, record.calibration_pictures, record.float_groups) == (4, 6, ())
    assert 0 < record.agreement.matched <= 1
    assert after.manifest.model_copy(update={"int8": None}) == before.manifest
    assert (folder / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    said = capsys.readouterr().out
    assert "float32 on 4 pictures of val: AP 0." in said
    session = onnxruntime.InferenceSession(folder / INT8_FILE, providers=["CPUExecutionProvider"])  # no library of ours
    assert [(value.name, value.type, value.shape) for value in session.get_outputs()] == [
        ("boxes", "tensor(float)", ["N", 48, 4]),
        ("scores", "tensor(float)", ["N", 48]),
        ("labels", "tensor(int64)", ["N", 48]),
    ]
    again = tmp_path / "elsewhere"
    assert export("--bundle", folder, "--data", data, "--calibration-pictures", "6", "--output", again) == 0
    assert sha256_of(again / INT8_FILE) == record.sha256  # the same from the same


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn smears that the embedded model finds cells in."""
    folder = tmp_path_factory.mktemp("smears")
    for part, count, seed in (("train", 4, 0), ("val", 3, 100)):
        write_smears(folder, count, seed).rename(folder / f"instances_{part}.json")
    return folder


def test_the_record_has_the_ap_of_either_graph_and_the_noise_that_the_gate_allows(smears: Path, tmp_path: Path) -> None:
    assert export("--bundle", embedded_bundle(), "--data", smears, "--output", tmp_path / "bundle") == 0
    bundle = read_bundle(tmp_path / "bundle")
    record = bundle.manifest.int8
    assert record is not None
    assert bundle.int8_path is not None
    data = Comparison(smears, "val", bundle)
    for path, said in ((bundle.onnx_path, record.ap_fp32), (bundle.int8_path, record.ap_int8)):
        assert said == pytest.approx(data.average_precision(run(onnx.load(path), LIBRARY)), abs=1e-6)
    assert record.ap_fp32 > 0.4, "it finds something"
    assert record.ap_int8 != record.ap_fp32
    assert record.ap_int8 >= record.ap_fp32 - 0.01
    assert record.agreement.matched > 0.9
    proof = read_proof(bundle)
    assert proof is not None
    assert proof.integers == record.noise
    limits = limits_for("int8", record.noise)
    assert limits.box_median == pytest.approx(1.5 * record.noise["box_median"])
    assert 1e-4 < limits.box_median < LIMITS["int8"].box_median
    report = run_gate(run(onnx.load(bundle.int8_path), LIBRARY), proof, "int8", (2,), bundle.manifest.canvases[:1])
    assert report.limits == limits
    assert report.passed, report.failures


def test_groups_are_told_apart_by_pictures_of_the_whole_folder(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[np.ndarray] = []

    def choose(*arguments: Any) -> None:
        shown.extend(feed["images"] for feed in arguments[3])
        raise RuntimeError("seen")

    monkeypatch.setattr("cli.quantise.choose", choose)
    monkeypatch.setattr("cli.quantise.PROBES", 2)
    with pytest.raises(RuntimeError, match="seen"):
        export("--bundle", folder, "--data", data)
    manifest = read_bundle(folder).manifest
    pictures = read_split(data, "train").pictures
    for image, picture in zip(shown, (pictures[0], pictures[4]), strict=True):
        pixels, canvas = preprocess(read_pixels(picture), manifest)
        np.testing.assert_array_equal(image, lay_on_canvas([pixels], canvas)[0])


@pytest.mark.parametrize("broken", ["cli.quantise.calibrate", "cli.quantise.answers"])
def test_what_onnx_runtime_raises_is_one_line(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    def lacks_memory(*_arguments: object) -> None:
        onnxruntime.InferenceSession(b"no graph")

    monkeypatch.setattr(broken, lacks_memory)
    assert export("--bundle", folder, "--data", data) == 1
    said = capsys.readouterr().err
    assert said.startswith("ddetr export: [ONNXRuntimeError] ")
    assert said.count("\n") == 1
    assert read_bundle(folder).int8_path is None


def test_lack_of_memory_is_one_line(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks_memory(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cli.quantise.calibrate", lacks_memory)
    assert export("--bundle", folder, "--data", data) == 1
    assert capsys.readouterr().err == "ddetr export: memory does not suffice: end what else uses it\n"


def test_a_graph_that_loses_ap_is_refused_and_the_bundle_is_as_it_was(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = {path.name: sha256_of(path) for path in folder.iterdir()}
    assert export("--bundle", folder, "--data", data, "--max-ap-drop", "-1") == 1
    error = capsys.readouterr().err
    assert error.startswith("ddetr export: refused: AP is ")
    assert "in integers" in error
    assert "in float32, on 4 pictures of" in error
    assert str(data / "instances_val.json") in error
    assert error.count("\n") == 1
    assert {path.name: sha256_of(path) for path in folder.iterdir()} == hashes


def test_what_a_server_would_not_take_is_refused(
    exported: Callable[[str], Exported], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle's own proof is asked, too; random weights, whose proposals are all nearly tied, cannot pass it."""
    folder = shutil.copytree(exported("r50-two-stage").bundle.path, tmp_path / "bundle")
    assert export("--bundle", folder, "--data", data, "--calibration-pictures", "2") == 1
    said = capsys.readouterr()
    assert "enc_output alone: " in said.out
    assert "refused: the bundle's proof fails: canvas 64x96" in said.err
    assert "; nor with " in said.err
    assert read_bundle(folder).int8_path is None


def test_a_changed_file_and_a_graph_of_another_model_are_told(folder: Path, data: Path) -> None:
    assert export("--bundle", folder, "--data", data, "--calibration-pictures", "2") == 0
    content = (folder / INT8_FILE).read_bytes()
    (folder / INT8_FILE).write_bytes(content[:-1] + b"!")
    with pytest.raises(HashMismatch, match=INT8_FILE):
        read_bundle(folder)
    (folder / INT8_FILE).write_bytes(content)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["int8"]["of"] = "0" * 64
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(HashMismatch, match=r"made from another model\.onnx .*quantise the bundle again"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--int8 needs --data DIR: pictures of train to take the ranges from"),
        (["--data", "d"], "name either --bundle, one that is there, or --checkpoint and --output"),
        (["--data", "d", "--checkpoint", "c"], "--checkpoint needs --output"),
        (["--data", "d", "--bundle", "b", "--variant", "r50"], "what is --variant r50 for?"),
        (["--data", "d", "--bundle", "b", "--calibration-pictures", "0"], "at least 1"),
        (["--data", "d", "--bundle", "b", "--threads", "0"], "--threads is 0; it must be at least 1"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_data_that_cannot_measure_is_one_line(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    document = json.loads((other / "instances_val.json").read_text())
    (other / "instances_val.json").write_text(json.dumps({**document, "annotations": []}))
    assert export("--bundle", folder, "--data", other) == 1
    assert "instances_val.json has no boxes to measure AP on" in capsys.readouterr().err
    document["categories"].append({"id": 99, "name": "yeast"})
    (other / "instances_val.json").write_text(json.dumps(document))
    assert export("--bundle", folder, "--data", other) == 1
    assert "has categories [99], which the bundle does not know" in capsys.readouterr().err
