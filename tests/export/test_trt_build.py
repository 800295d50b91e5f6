"""A checkpoint into a bundle with an engine of TensorRT-RTX, at a small size; and what goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import export.build_errors
import export.engine_bundle
import export.flavour
import export.onnx_export
import export.trt_build
import plugins
from benchmarks.corruptions import run
from bundle import Bundle, EngineMismatch, HashMismatch, find_engine, read_bundle, write_bundle
from export.build import PLUGIN_LAYER, LayerReport, NotBuilt, NotParsed, PluginMissing
from export.build_errors import way_out
from export.engine_bundle import Request, build_engine
from export.engine_gate import EngineWrong
from export.flavour import FLAVOURS, NotInstalled, TargetError
from export.half_parity import paired
from export.layers import LayersWrong, check_layers, described, from_json, to_json
from export.steps import Occupied, Steps, alone_in
from export.trt_build import main
from export.verify import Answers
from models import save_checkpoint
from parity import read_proof, run_gate
from runtime import EngineRefused, Gpu
from tests.conftest import has_gpu
from tests.export.conftest import Exported
from tests.export.small import CANVASES, build, small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rtx() -> None:
    try:
        FLAVOURS["rtx"].load()
    except NotInstalled as error:
        pytest.skip(str(error))
    if plugins.tensorrt_library() is None:
        pytest.skip("the TensorRT plugin was not built: no nvcc, or no TensorRT headers")


@dataclass(frozen=True)
class Built:
    request: Request
    bundle: Bundle
    said: list[str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_checkpoint(build(small("r50")), path)
    return path


@pytest.fixture(scope="module")
def built(rtx: None, weights: Path, exported: Callable[[str], Exported]) -> Built:
    request = Request(
        weights,
        weights.parent / "cells",
        flavour="rtx",
        targets=("sm86", "sm89"),
        canvases=CANVASES,
        typical_batch_size=2,
        max_batch_size=3,
        with_checkpoint=True,
    )
    said: list[str] = []
    proto = exported("r50").proto()
    with pytest.MonkeyPatch.context() as patch:
        # The bundle's graph is the one that other tests have traced of this network: tracing takes seconds.
        patch.setattr(export.onnx_export, "trace", lambda model, *, for_cpu: proto)
        return Built(request, build_engine(request, said.append), said)


def steps_done(said: list[str]) -> dict[str, str]:
    """Step -> "kept" or "done", of the lines of results."""
    results = [line.split() for line in said if line.startswith("[") and not line.endswith("...")]
    return {words[1]: "kept" if words[2] == "kept" else "done" for words in results}


def test_a_checkpoint_becomes_a_bundle_with_its_engine(built: Built) -> None:
    bundle = read_bundle(built.request.output or "")
    (engine,) = bundle.manifest.engines
    assert engine.file == "rtx-sm86-sm89-fp16.engine"
    assert (engine.flavour, engine.precision, engine.targets) == ("rtx", "fp16", ("sm86", "sm89"))
    assert [profile.canvas for profile in engine.profiles] == list(CANVASES)
    assert {(profile.typical_batch_size, profile.max_batch_size) for profile in engine.profiles} == {(2, 3)}
    assert engine.built_with["rtx"] == FLAVOURS["rtx"].load().__version__
    assert set(engine.hashes) == {"graph", "plugin"}
    assert {record.batch_size for record in engine.graph_parity} == {1, 3}
    assert bundle.checkpoint_path is not None
    left = sorted(path.name for path in bundle.path.parent.iterdir())
    assert left == [".cells.build", "cells", "weights.safetensors"], "nothing half-written is left beside it"


def test_every_step_says_its_time_and_its_result(built: Built) -> None:
    names = ["load", "bundle", "trace", "verify", "build", "check", "gate", "publish"]
    assert steps_done(built.said) == dict.fromkeys(names, "done")
    text = "\n".join(built.said)
    assert "2 of them MSDeformAttn" in text
    assert "2 plugin, 0 GridSample; plugin inputs: half int64 float half half" in text
    (half,) = [line for line in built.said if line.strip().startswith("half:")]
    (full,) = [line for line in built.said if line.strip().startswith("float:")]
    assert "CONVOLUTION" in half
    assert "2 PLUGIN_V3" in half
    assert "SOFTMAX" in full
    assert "SOFTMAX" not in half
    assert "NORMALIZATION" not in half


def test_an_engine_that_cannot_be_run_here_is_said_so_and_carries_no_parity(built: Built) -> None:
    (engine,) = built.bundle.manifest.engines
    if not has_gpu():
        assert engine.parity == ()
        assert any("gate" in line and "NOT RUN HERE: " in line for line in built.said)
    assert "proof" in built.bundle.manifest.hashes


def test_the_half_graph_an_engine_is_built_of_passes_the_gate(built: Built) -> None:
    proof = read_proof(built.bundle)
    assert proof is not None
    graph = onnx.load(built.bundle.path.parent / ".cells.build" / "graph-fp16.onnx")
    report = run_gate(run(graph, plugins.onnxruntime_library()), proof, "fp16", (1, 3))
    assert report.passed, report.failures


def test_where_a_gpu_is_there_the_engine_is_held_against_the_proof(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(built.bundle.path.parent / ".cells.build", work)
    request = replace(built.request, output=tmp_path / "cells", work=work)
    proof = read_proof(built.bundle)
    assert proof is not None
    graph = onnx.load(work / "graph-fp16.onnx")
    report = run_gate(run(graph, plugins.onnxruntime_library()), proof, "fp16", (1, 3))
    monkeypatch.setattr(export.engine_bundle, "gpu_for", lambda record: Gpu(0, "A GPU", "sm89"))

    def wrong(*_: Any) -> None:
        raise EngineWrong("the engine answers wrong and is not published: canvas 64x96")

    monkeypatch.setattr(export.engine_bundle, "gate_engine", wrong)
    with pytest.raises(EngineWrong):
        build_engine(request)
    assert not (tmp_path / "cells").exists(), "a wrong engine is not published"
    monkeypatch.setattr(export.engine_bundle, "gate_engine", lambda *_: report)
    said: list[str] = []
    (engine,) = build_engine(request, said.append).manifest.engines
    assert steps_done(said)["build"] == "kept"
    assert {(str(one.canvas), one.batch_size) for one in engine.parity} == {
        (str(canvas), size) for canvas in CANVASES for size in (1, 3)
    }
    assert any("answers as PyTorch does on" in line and "A GPU, sm89" in line for line in said)


def test_a_bundle_of_before_gets_its_proof(built: Built, tmp_path: Path) -> None:
    place, work = tmp_path / "cells", tmp_path / "work"
    shutil.copytree(built.bundle.path, place)
    shutil.copytree(built.bundle.path.parent / ".cells.build", work)
    (place / "proof.npz").unlink()
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest["hashes"]["proof"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    bundle = build_engine(replace(built.request, output=place, work=work), said.append)
    assert read_proof(bundle) is not None
    assert any("proof.npz, which it had not" in line for line in said)


def test_done_again_nothing_is_done(built: Built) -> None:
    before = (built.bundle.path / "manifest.json").stat().st_mtime_ns
    said: list[str] = []
    build_engine(built.request, said.append)
    done = steps_done(said)
    assert {name for name, how in done.items() if how == "done"} <= {"bundle", "publish"}, done
    assert "there already" in said[-1]
    assert (built.bundle.path / "manifest.json").stat().st_mtime_ns == before


def test_after_a_break_it_goes_on(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    shutil.copytree(built.bundle.path.parent / ".cells.build", work)
    request = replace(built.request, output=tmp_path / "cells", work=work)

    def broken(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export.engine_bundle, "write_bundle", broken)
        with pytest.raises(OSError, match="No space left"):
            build_engine(request)
    assert not request.output or not request.output.exists()
    (work / "rtx-sm86-sm89-fp16.engine").write_bytes(b"half of it")
    said: list[str] = []
    bundle = build_engine(request, said.append)
    done = steps_done(said)
    assert done["trace"] == done["verify"] == "kept"
    assert done["build"] == "done", "a file that is not as it was left is not believed"
    assert (bundle.path / "rtx-sm86-sm89-fp16.engine").stat().st_size > 10_000


def test_a_second_engine_joins_the_first(built: Built, tmp_path: Path) -> None:
    """From a bundle that carries its checkpoint, in its own place."""
    place, work = tmp_path / "cells", tmp_path / "work"
    shutil.copytree(built.bundle.path, place)
    shutil.copytree(built.bundle.path.parent / ".cells.build", work)
    request = replace(built.request, checkpoint=place, output=None, targets=("sm120",), canvases=(), work=work)
    said: list[str] = []
    bundle = build_engine(request, said.append)
    assert [engine.file for engine in bundle.manifest.engines] == [
        "rtx-sm86-sm89-fp16.engine",
        "rtx-sm120-fp16.engine",
    ]
    assert steps_done(said)["trace"] == "kept", "the same weights need no new graph"
    assert find_engine(bundle, "rtx", "sm89").precision == "fp16"
    assert find_engine(bundle, "rtx", "sm120").file == "rtx-sm120-fp16.engine"
    with pytest.raises(EngineMismatch, match="no engine for rtx-sm75; it has rtx-sm86-sm89-fp16.engine, rtx-sm120"):
        find_engine(bundle, "rtx", "sm75")
    (place / "rtx-sm120-fp16.engine").write_bytes(b"another")
    with pytest.raises(HashMismatch, match=r"rtx-sm120-fp16\.engine: SHA-256 is"):
        read_bundle(place)


def test_a_bundle_of_another_checkpoint_is_left_alone(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_checkpoint(build(small("r50"), seed=1), other)
    before = (built.bundle.path / "manifest.json").read_bytes()
    flags = ["--flavour", "rtx", "--targets", "sm86", "--work", str(tmp_path / "work")]
    assert main(["--checkpoint", str(other), "--output", str(built.bundle.path), *flags]) == 1
    error = capsys.readouterr().err
    assert "made of another checkpoint than this custom" in error
    assert "give another --output, or --replace it" in error
    assert error.count("\n") == 1
    assert (built.bundle.path / "manifest.json").read_bytes() == before


def test_a_checkpoint_of_another_variant(rtx: None, weights: Path, tmp_path: Path) -> None:
    done = run_script(["--checkpoint", str(weights), "--output", "out", "--variant", "r50-two-stage"], tmp_path)
    assert done.returncode == 1
    assert "two_stage" in done.stderr or "r50-two-stage" in done.stderr
    assert done.stderr.rstrip().endswith("leave --variant out, or name the checkpoint's own")
    assert done.stderr.count("\n") == 1, done.stderr


def run_script(
    arguments: list[str], folder: Path, script: Path = ROOT / "export" / "trt_build.py"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "--flavour", "rtx", "--targets", "sm86", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_it_runs_as_a_file() -> None:
    """From the repository's root; from another folder it is in the test of another variant."""
    done = run_script(["--help"], ROOT, Path("export/trt_build.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(
    rtx: None, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(weights), "--output", str(tmp_path / "b"), "--flavour", "rtx"]) == 1
    error = capsys.readouterr().err
    assert "this machine has no NVIDIA GPU to build for: build where one is, or for named ones with" in error
    assert list(tmp_path.iterdir()) == [], "known before anything is written"


def test_without_tensorrt_the_way_out_is_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(["--checkpoint", str(weights), "--output", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().err.endswith(
        "TensorRT is not installed: pip install tensorrt, or build without it and without a GPU: "
        "--flavour rtx --targets sm86,sm89\n"
    )


def test_a_full_disk_is_known_before_the_build(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(built.bundle.path.parent / ".cells.build", work)
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(export.build_errors.shutil, "disk_usage", lambda _: full)
    canvases = ",".join(map(str, CANVASES))
    flags = ["--flavour", "rtx", "--targets", "sm86", "--work", str(work), "--canvases", canvases]
    flags += ["--checkpoint", str(built.request.checkpoint), "--output", str(tmp_path / "b"), "--with-checkpoint"]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "has 1 MiB free" in error
    assert "free some, or give --output and --work on another disk" in error
    assert not (tmp_path / "b").exists()


def test_tensorrt_builds_for_later_gpus_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the package, which is not on this project's machines."""
    levels = SimpleNamespace(AMPERE_PLUS="later, too")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(HardwareCompatibilityLevel=levels))
    monkeypatch.setattr(export.flavour, "gpu_architecture", lambda: "sm86")
    tensorrt, config = FLAVOURS["tensorrt"], SimpleNamespace()
    assert tensorrt.targets(()) == ("sm86",)
    tensorrt.aim(config, ("sm86",))
    assert not vars(config)
    assert tensorrt.widened(("sm86",)) == ("sm80+",)
    tensorrt.aim(config, ("sm80+",))
    assert config.hardware_compatibility_level == "later, too"
    with pytest.raises(TargetError, match="on Ampere .sm80. or a later one, not on sm75"):
        tensorrt.widened(("sm75",))
    with pytest.raises(TargetError, match="here sm86, sm89, and has no hardware compatibility"):
        FLAVOURS["rtx"].widened(("sm86", "sm89"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotBuilt("rtx built no engine for sm86: OutOfMemory (no details)"), "smaller --max-batch-size"),
        (NotBuilt("Skipping tactic 3 due to insufficient memory on requested size"), "smaller --max-batch-size"),
        (MemoryError(), "smaller --canvases"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "smaller --canvases",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/bundles"), "where this user may write"),
        (PluginMissing("libx.so brings no plugin MSDeformAttn: undefined symbol"), "python -m plugins.build"),
        (NotParsed("node n (NonZero): unsupported"), "serve the bundle with ONNX Runtime"),
        (OSError(errno.ENOSPC, "No space left on device"), "on another disk"),
        (TargetError("TensorRT-RTX builds for sm75, not for sm90"), None),
    ],
)
def test_ways_out(error: Exception, said: str | None) -> None:
    assert said in way_out(error) if said else way_out(error) == ""


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/bundles/r50"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        EngineRefused("cells.engine cannot be loaded by tensorrt 10.14"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_mend_is_one_line(
    error: Exception, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(export.trt_build, "build_engine", failing)
    assert main(["--checkpoint", str(weights)]) == 1
    said = capsys.readouterr().err
    assert (str(error) or "MemoryError") in said
    assert said.count("\n") == 1


def test_what_onnx_runtime_raises_is_one_line(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export.trt_build, "build_engine", lambda *_, **__: onnxruntime.InferenceSession(b"no graph"))
    assert main(["--checkpoint", str(weights)]) == 1
    assert "[ONNXRuntimeError]" in capsys.readouterr().err


def test_a_fault_of_the_program_is_not_hidden(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.trt_build, "build_engine", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        main(["--checkpoint", str(weights)])


def report_of(layers: dict[tuple[str, str], int], *inputs: tuple[str, ...]) -> LayerReport:
    return LayerReport(layers, inputs)


HALF = ("half", "int64", "float", "half", "half")
FLOAT = ("float", "int64", "float", "float", "float")
GOOD = {(PLUGIN_LAYER, "half"): 1, ("CONVOLUTION", "half"): 2, ("SOFTMAX", "float"): 1}


@pytest.mark.parametrize(
    ("layers", "inputs", "precision", "message"),
    [
        (GOOD, HALF, "fp16", None),
        ({**GOOD, ("GRID_SAMPLE", "float"): 1}, HALF, "fp16", "1 plugin layers and 1 GridSample layers"),
        ({("CONVOLUTION", "half"): 2}, HALF, "fp16", "1 attentions became 0 plugin layers"),
        (GOOD, ("half", "int64", "half", "half", "half"), "fp16", "plugin layer 0 takes half, int64, half"),
        ({**GOOD, ("SOFTMAX", "half"): 1}, HALF, "fp16", "1 SOFTMAX layers are half"),
        ({**GOOD, ("NORMALIZATION", "half"): 3}, HALF, "fp16", "3 NORMALIZATION layers are half"),
        ({**GOOD, ("CONVOLUTION", "float"): 3}, HALF, "fp16", "2 of 5 CONVOLUTION layers are half"),
        (GOOD, FLOAT, "fp32", "half layers in a network of fp32: CONVOLUTION, PLUGIN_V3"),
    ],
)
def test_layers_that_are_wrong_are_named(
    layers: dict[tuple[str, str], int], inputs: tuple[str, ...], precision: str, message: str | None
) -> None:
    report = report_of(layers, inputs)
    assert from_json(json.loads(json.dumps(to_json(report)))) == report
    if message is None:
        check_layers(report, 1, precision)
        assert described(report)[1:] == ["half: 2 CONVOLUTION, 1 PLUGIN_V3", "float: 1 SOFTMAX"]
        return
    with pytest.raises(LayersWrong, match=message):
        check_layers(report, 1, precision)


def test_queries_are_paired_by_what_they_say() -> None:
    random = np.random.default_rng(0)
    want = Answers(random.random((1, 6, 3), np.float32), random.random((1, 6, 4), np.float32))
    turned = Answers(np.roll(want.scores, 2, 1) + 1e-3, np.roll(want.boxes, 2, 1))
    pairs = paired(want, turned, 0)
    assert len(pairs) == 6
    assert max(score for _, score in pairs) == pytest.approx(1e-3, abs=1e-5)
    turned.boxes[0, 0] = np.nan
    assert len(paired(want, turned, 0)) == 5
    twice = Answers(want.scores[:, [0, 0, 2, 3, 4, 5]], want.boxes[:, [0, 0, 2, 3, 4, 5]])
    assert len(paired(want, twice, 0)) == 5, "one to one"


def test_a_step_is_kept_until_its_inputs_change(tmp_path: Path) -> None:
    def one(inputs: dict[str, Any]) -> list[str]:
        said: list[str] = []

        def work() -> dict[str, Any]:
            (tmp_path / "file").write_text("whole")
            return {"line": "made"}

        assert Steps(tmp_path, ("make",), said.append)("make", inputs, work, ["file"]) == {"line": "made"}
        return said

    assert len(one({"a": 1})) == 2
    assert one({"a": 1}) == ["[1/1] make       kept   made"]
    assert len(one({"a": 2})) == 2
    (tmp_path / "file").write_text("spoilt")
    assert len(one({"a": 2})) == 2
    (tmp_path / "steps.json").write_text("{ half")
    assert len(one({"a": 2})) == 2


def test_a_failed_step_is_not_kept(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise NotBuilt("no")

    with pytest.raises(NotBuilt):
        Steps(tmp_path, ("make",), lambda _: None)("make", {}, fails)
    assert Steps(tmp_path, ("make",), lambda _: None)("make", {}, lambda: {"a": 1}) == {"a": 1}


def test_one_build_at_a_time(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "work"),
        pytest.raises(Occupied, match="another build is at work"),
        alone_in(tmp_path / "work"),
    ):
        pass
    with alone_in(tmp_path / "work"):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "--output is needed"),
        ({"checkpoint": Path("nowhere.pth")}, r"no checkpoint at nowhere\.pth"),
        ({"typical_batch_size": 9}, r"typical batch size 9 is not in 1\.\.8"),
        ({"workspace_mib": 0}, "--workspace-mib is 0; it must be at least 1"),
    ],
)
def test_what_is_asked_is_checked_first(weights: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_engine(replace(Request(weights, tmp_path / "b"), **change))


def test_a_bundle_without_its_checkpoint_says_so(built: Built, tmp_path: Path) -> None:
    bare = write_bundle(
        tmp_path / "bare",
        built.bundle.manifest.model_copy(update={"engines": ()}),
        {name: built.bundle.path / name for name in ("model.onnx", "proof.npz")},
    )
    with pytest.raises(ValueError, match=r"carries no model\.safetensors: give its checkpoint as --checkpoint"):
        build_engine(Request(bare.path))
