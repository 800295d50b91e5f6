"""ddetr verify: what it says of a right bundle and of a wrong one, in each form, and its exit status."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from bundle import Bundle, embedded_bundle, read_bundle, write_bundle
from bundle.reader import MANIFEST_FILE, ONNX_FILE, PROOF_FILE
from cli import verify_data
from cli.main import main
from cli.verify import CANNOT_RUN, FAILED, PASSED
from cli.verify_page import EXPECTED, GOT
from parity.proof import proof_bytes
from runtime import OutOfGpuMemory
from samples.coco import write_smears
from tests.server.fake_engine import FakeEngine
from tests.server.gpus import Gpus, bundle_with, engine_record, installed
from tests.server.proofs import proof_by

QUICK = ["--engine", "onnxruntime", "--device", "cpu", "--batch-sizes", "1", "--canvases", "288x288"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDETR_ENGINE_THREADS", "1")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bundle with one weight of its graph changed, and hashes that agree."""
    source = read_bundle(embedded_bundle())
    graph = onnx.load(source.onnx_path)
    weight = next(w for w in graph.graph.initializer if "backbone.layer2" in w.name and len(w.dims) >= 4)
    values = np.array(numpy_helper.to_array(weight))
    values.flat[np.abs(values).argmax()] *= -6
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return rewritten(tmp_path_factory.mktemp("wrong") / "bundle", {ONNX_FILE: graph.SerializeToString()}, "onnx")


def rewritten(folder: Path, files: dict[str, bytes], hash_name: str) -> Path:
    """The embedded bundle with other files; without the proof where its hash is named."""
    source = read_bundle(embedded_bundle())
    hashes = {name: digest for name, digest in source.manifest.hashes.items() if name != hash_name}
    old = {path.name: path for path in source.path.iterdir() if path.name not in (MANIFEST_FILE, *files)}
    if hash_name == "proof":
        del old[PROOF_FILE]
    write_bundle(folder, source.manifest.model_copy(update={"hashes": hashes}), {**old, **files})
    return folder


def test_a_right_bundle_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(embedded_bundle()), *QUICK[:-2]]) == PASSED
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("blood-cells 1, ")
    assert said[2].startswith("passed   onnxruntime on cpu, fp32: 12 answers in ")
    assert said[4].split()[:2] == ["fp32", "limit"]
    assert [line.split()[:3] for line in said[5:8]] == [[c, "1", "4"] for c in ("288x288", "288x384", "384x288")]


def test_every_engine_there_is_is_tried_and_those_that_cannot_run_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(embedded_bundle()), *QUICK[2:], "--format", "json"]) == PASSED
    engines = json.loads(capsys.readouterr().out)["engines"]
    found = [(engine["engine"], engine["verdict"]) for engine in engines]
    assert found[0] == ("tensorrt", "not run")
    assert found[1:] == [("onnxruntime on cpu", "passed"), ("onnxruntime on cpu, the op's function", "passed")]
    assert "NVIDIA" in engines[0]["why"]


def test_a_wrong_bundle_fails_and_the_figures_are_named(wrong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(wrong), *QUICK]) == FAILED
    said = capsys.readouterr().out
    assert "FAILED   onnxruntime on cpu, fp32: 4 answers" in said
    assert "caught by" in said
    assert re.search(r"canvas 288x288, batch of 1, slot 0, picture 0: strays: \d+ of 100 detections", said)


def test_json_has_figures_limits_and_failures(wrong: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(wrong), *QUICK, "--format", "json", "--output", str(report)]) == FAILED
    document = json.loads(report.read_bytes())
    (engine,) = document["engines"]
    assert not document["passed"]
    assert not engine["passed"]
    assert engine["failures"]
    assert engine["caught_by"]["difference of the sorted scores"] > 0
    assert [figures["canvas"] for figures in engine["figures"]] == ["288x288"]
    assert engine["figures"][0]["curve"] > engine["limits"]["curve"]
    assert sum(figures["failures"] for figures in engine["figures"]) == len(engine["failures"])


def test_html_is_one_file_with_pictures_of_the_disagreements(wrong: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main(["verify", str(wrong), *QUICK, "--format", "html", "--output", str(report)]) == FAILED
    text = report.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "nothing is fetched"
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    assert 1 <= len(pictures) <= 6
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        pixels = np.asarray(picture.convert("RGB"), np.int16)
    for colour in (EXPECTED, GOT):
        assert (np.abs(pixels - np.array(colour)).max(-1) < 25).sum() > 100, "the boxes of either side"
    assert "of PyTorch</span>" in text
    assert "strays" in text


def test_html_of_a_right_bundle_has_no_disagreement(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert main(["verify", str(embedded_bundle()), *QUICK, "--format", "html", "--output", str(report)]) == PASSED
    assert "No disagreement." in report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smears")
    write_smears(folder, 3, seed=900_000_000)
    (folder / "instances.json").rename(folder / "instances_val.json")
    return folder


def test_ap_of_both_sides_is_compared(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(embedded_bundle()), *QUICK, "--data", str(data), "--format", "json"]
    assert main(words) == PASSED
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["ap"]["reference"] > 0.4
    assert engine["ap"]["engine"] == pytest.approx(engine["ap"]["reference"], abs=2e-3)


def test_an_engine_that_costs_ap_fails(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_data.Comparison, "reference", lambda self: 0.99)
    assert main(["verify", str(embedded_bundle()), *QUICK, "--data", str(data)]) == FAILED
    assert re.search(r"FAILED .*AP 0\.\d+, reference 0\.9900, may fall by 0\.002", capsys.readouterr().out)


def test_what_cannot_be_verified_is_said_in_a_line(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unproven = rewritten(tmp_path / "unproven", {}, "proof")
    cases = {
        str(tmp_path / "nowhere"): "no bundle at",
        str(unproven): "carries no proof; export its checkpoint again: ddetr export",
    }
    for path, message in cases.items():
        assert main(["verify", path]) == CANNOT_RUN
        assert message in capsys.readouterr().err
    assert main(["verify", str(embedded_bundle()), "--canvases", "800x800"]) == CANNOT_RUN
    assert "has no canvas '800x800'; it has 288x288, 288x384, 384x288" in capsys.readouterr().err
    assert main(["verify", str(embedded_bundle()), *QUICK, "--data", str(tmp_path)]) == CANNOT_RUN
    assert "no annotations for 'val'" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(embedded_bundle()), *QUICK, "--output", str(tmp_path)]) == CANNOT_RUN
    assert f"the report cannot be written: [Errno 21] Is a directory: '{tmp_path}'" in capsys.readouterr().err


def test_the_only_engine_asked_for_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(embedded_bundle()), "--engine", "tensorrt", "--device", "cpu"]) == CANNOT_RUN
    said = capsys.readouterr()
    assert "not run  tensorrt: " in said.out
    assert "no engine could be run" in said.err


SM80, RTX_SM80 = "tensorrt-sm80-fp16.engine", "rtx-sm80-fp16.engine"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    with installed(monkeypatch, "sm80") as gpus:
        yield gpus


def built(folder: Path, *files: str, **how: Any) -> Bundle:
    """A bundle whose built engines for 1 to 4 images answer as its proof says."""
    return bundle_with(folder, *files, proof=proof_bytes(proof_by(FakeEngine())), **how)


def engines_said(
    path: Path, *words: str, status: int, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], str]:
    """Name to what is said of it, and standard error."""
    assert main(["verify", str(path), *words, "--format", "json"]) == status
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["passed"] == (status == PASSED)
    return {engine["engine"]: engine for engine in document["engines"]}, said.err


def test_a_built_engine_is_asked_in_the_sizes_it_was_built_for(
    gpus: Gpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = built(tmp_path / "one", SM80)
    said, complaint = engines_said(bundle.path, "--engine", "tensorrt", status=PASSED, capsys=capsys)
    ((name, engine),) = said.items()
    assert name == f"tensorrt {SM80} on cuda:0"
    assert sorted({figures["batch_size"] for figures in engine["figures"]}) == [1, 4]
    assert complaint == ""


def test_a_size_that_an_engine_was_not_built_for_is_no_fault_of_its_answers(
    gpus: Gpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = read_bundle(embedded_bundle())
    (tmp_path / SM80).write_bytes(b"never read")
    record = engine_record(SM80, tmp_path / SM80, most=1, canvases=source.manifest.canvases)
    files = {path.name: path for path in (*source.path.iterdir(), tmp_path / SM80) if path.name != MANIFEST_FILE}
    write_bundle(tmp_path / "one", source.manifest.model_copy(update={"engines": (record,)}), files)
    words = ["--batch-sizes", "1,2", "--canvases", "288x288"]
    said, complaint = engines_said(tmp_path / "one", *words, status=FAILED, capsys=capsys)
    engine = said[f"tensorrt {SM80} on cuda:0"]
    assert engine["verdict"] == "CANNOT"
    assert "it is built for at most 1 images at once, and --batch-sizes asks for 2: leave that out, or" in engine["why"]
    assert said["onnxruntime on cpu"]["verdict"] == "passed"
    assert complaint.startswith(f"ddetr verify: not compared: tensorrt {SM80} on cuda:0: it is built for")
    assert gpus.opened == []


def test_an_engine_for_this_machine_that_cannot_be_opened_is_never_a_success(
    gpus: Gpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = built(tmp_path / "two", SM80, RTX_SM80)
    gpus.cuda.fail("allocate", OutOfGpuMemory("cudaMalloc of 25 MiB: out of memory"), 2)
    said, complaint = engines_said(bundle.path, "--engine", "tensorrt", status=FAILED, capsys=capsys)
    assert said[f"tensorrt {SM80} on cuda:0"]["verdict"] == "CANNOT"
    assert said[f"tensorrt {RTX_SM80} on cuda:0"]["verdict"] == "passed"
    assert f"not compared: tensorrt {SM80} on cuda:0: cudaMalloc of 25 MiB: out of memory" in complaint


def test_an_engine_passed_over_beside_one_that_runs_is_told(
    gpus: Gpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(tmp_path / "two", SM80, RTX_SM80)
    monkeypatch.setattr(gpus.trt["rtx"], "__version__", "1.8.0", raising=False)
    said, complaint = engines_said(bundle.path, "--engine", "tensorrt", status=FAILED, capsys=capsys)
    assert said[f"tensorrt {SM80} on cuda:0"]["verdict"] == "passed"
    assert "it was built with rtx 10.14, and 1.8.0 is installed: build it again" in complaint


def test_an_engine_for_another_gpu_is_none_of_this_machine(
    gpus: Gpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = built(tmp_path / "other", "tensorrt-sm90-fp16.engine")
    said, complaint = engines_said(bundle.path, "--engine", "tensorrt", status=CANNOT_RUN, capsys=capsys)
    assert said["tensorrt"]["verdict"] == "not run"
    assert "has no engine for tensorrt-sm80-fp16; it has tensorrt-sm90-fp16" in said["tensorrt"]["why"]
    assert "not compared" not in complaint


@pytest.mark.parametrize("sizes", ["0", "1,x", "-2", ""])
def test_batch_sizes_are_numbers_above_nothing(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "anywhere", "--batch-sizes", sizes])
    assert stopped.value.code == CANNOT_RUN
    assert "is not a list of batch sizes such as 1,4,8" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--help"])
    assert stopped.value.code == 0
    assert "ddetr verify bundles/r50" in capsys.readouterr().out
