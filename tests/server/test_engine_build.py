"""Engines that a server has built beside serving, by a process that only seems to build."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from bundle import Bundle, read_bundle, write_bundle
from parity.proof import proof_bytes
from runtime import Gpu
from server.app import create_app
from server.engine_build import EngineBuilder, build_command
from server.engine_cache import EngineCache, NoRecipe, Recipe, recipe_for
from server.errors import StartupError
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.settings import Settings
from tests.server.fake_engine import MANIFEST
from tests.server.gpus import Gpus, bundle_with, installed
from tests.server.pictures import GREEN, encode, rectangle
from tests.server.proofs import proof_by
from tests.server.tiny_bundle import tiny_model

ROOT = Path(__file__).parents[2]
PICTURE = encode(rectangle(GREEN))


class Builds:
    """A server's surroundings: a bundle without an engine, a cache, and the process that builds."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.log, self.gate = folder / "cache", folder / "log", folder / "gate"
        self.trouble = "none"
        plugin = folder / "plugin.so"
        plugin.write_bytes(b"a plugin")
        monkeypatch.setattr("plugins.tensorrt_library", lambda: plugin)
        monkeypatch.setattr("server.engine_cache._installed", lambda: ("tensorrt", "10.14"))
        monkeypatch.setattr("server.engine_build._LOOK_S", 0.02)
        monkeypatch.setattr("server.app.EngineBuilder", partial(EngineBuilder, command=self.command))
        files: dict[str, Path | bytes] = {"model.onnx": tiny_model().SerializeToString(), "model.safetensors": b"w"}
        self.bundle: Bundle = write_bundle(folder / "bundle", MANIFEST, files)

    def command(self, recipe: Recipe, bundle: Bundle, gpu: Gpu, work: Path) -> list[str]:
        arguments = (work / "bundle", self.log, self.gate, self.trouble)
        return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.server.fake_builder", *map(str, arguments)]

    @property
    def begun(self) -> list[int]:
        """The processes that were begun."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def settings(self, **values: Any) -> Settings:
        """The bundle has no proof, so the gate is open."""
        fixed: dict[str, Any] = {"stall_timeout_ms": 60_000, "rollback_seconds": 0, "build_engine": "background"}
        fixed["gate"] = False
        fixed |= {"bundle": self.bundle.path, "engine_cache": self.cache}
        return Settings(**(fixed | values))

    @contextmanager
    def server(self, **values: Any) -> Iterator[TestClient]:
        with TestClient(create_app(self.settings(**values))) as client:
            yield client


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    with installed(monkeypatch, "sm80") as gpus:
        yield gpus
        assert gpus.left() == []


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Gpus) -> Builds:
    return Builds(tmp_path, monkeypatch)


def engine_of(client: TestClient) -> str:
    return str(client.get("/model").json()["engine"]).split()[0]


def detect(client: TestClient) -> int:
    return int(client.post("/detect", content=PICTURE, headers={"Content-Type": "image/png"}).status_code)


def until(true: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)  # what is waited for is another process


def test_it_serves_while_an_engine_is_built_and_then_by_the_engine(builds: Builds) -> None:
    with builds.server() as client:
        until(lambda: builds.begun, "the build begins")
        assert engine_of(client) == "onnxruntime"
        assert [detect(client) for _ in range(3)] == [200] * 3
        builds.gate.touch()
        statuses = []
        until(lambda: statuses.append(detect(client)) or engine_of(client) == "tensorrt", "the switch")
        assert set(statuses) == {200}
        assert detect(client) == 200
        assert 'ddetr_engine_builds_total{outcome="built"} 1.0' in client.get("/metrics").text
    assert len(builds.begun) == 1
    with builds.server() as client:
        assert engine_of(client) == "tensorrt", "from the first request on"
    assert len(builds.begun) == 1


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_where_tensorrt_alone_is_wanted_onnx_runtime_serves_until_it_is_built(builds: Builds, precision: str) -> None:
    with builds.server(engine="tensorrt", precision=precision) as client:
        assert (detect(client), engine_of(client)) == (200, "onnxruntime")
        [gate] = client.get("/model").json()["gate"]
        assert gate["unavailable"][0] == "tensorrt: for Double 0 (sm80) none is built yet"
        builds.gate.touch()
        until(lambda: engine_of(client) == "tensorrt", "the switch")


def test_where_tensorrt_alone_is_wanted_and_cannot_be_built_the_start_says_what_to_set(
    builds: Builds, tmp_path: Path
) -> None:
    bare = bundle_with(tmp_path / "bare")
    way_out = r"carries no checkpoint to build from .*\(engine=auto would let ONNX Runtime serve\)"
    with pytest.raises(StartupError, match=way_out):
        create_app(builds.settings(engine="tensorrt", bundle=bare.path))
    way_out = r"for Double 0 \(sm80\) none is built yet; .* \(device=auto would let the CPU serve until it is built\)"
    with pytest.raises(StartupError, match=way_out):
        create_app(builds.settings(engine="tensorrt", device="cuda"))


def test_a_build_that_fails_is_told_once_and_not_tried_again(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    builds.trouble = "fail"
    builds.gate.touch()
    why = "ddetr build: out of memory at a tactic: give a smaller --max-batch-size"
    with builds.server() as client:
        until(lambda: why in caplog.text, "the failure")
        assert (detect(client), engine_of(client)) == (200, "onnxruntime")
    caplog.clear()
    with builds.server() as client:
        until(lambda: f"it failed before: {why}" in caplog.text, "the refusal")
        assert detect(client) == 200
        [gate] = client.get("/model").json()["gate"]
        assert f"none could be built: {why}" in gate["unavailable"][0]
    assert len(builds.begun) == 1
    [marker] = builds.cache.glob("*.failed")
    marker.unlink()
    builds.trouble = "none"
    with builds.server() as client:
        until(lambda: engine_of(client) == "tensorrt", "the switch")
    assert len(builds.begun) == 2


def test_a_build_without_the_engine_that_was_asked_for(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    builds.trouble = "empty"
    builds.gate.touch()
    with builds.server():
        until(lambda: "has no fp16 engine of tensorrt for sm80" in caplog.text, "the failure")


def test_a_host_that_cannot_build_says_so_and_remembers_nothing(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.engine_build.BUILD_NEEDS", ("json", "no_such_package"))
    with builds.server() as client:
        until(lambda: r"that takes no_such_package: pip install 'ddetr[export]'" in caplog.text, "the reason")
        assert (detect(client), engine_of(client)) == (200, "onnxruntime")
    assert builds.begun == []
    assert not list(builds.cache.glob("*.failed"))


def test_two_servers_build_one_engine(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with builds.server() as first, builds.server() as second:
        until(lambda: builds.begun, "the build begins")
        until(lambda: "another process builds the engine" in caplog.text, "the other waits")
        assert {engine_of(first), engine_of(second)} == {"onnxruntime"}
        builds.gate.touch()
        until(lambda: {engine_of(first), engine_of(second)} == {"tensorrt"}, "both switch")
    assert len(builds.begun) == 1


def test_a_server_that_stops_ends_its_build(builds: Builds) -> None:
    with builds.server():
        until(lambda: builds.begun, "the build begins")
    [process] = builds.begun
    until(lambda: not Path(f"/proc/{process}").exists(), "its end")
    assert not list(builds.cache.glob("*.failed")), "it goes on another time"
    builds.gate.touch()
    with builds.server() as client:
        until(lambda: engine_of(client) == "tensorrt", "the switch")


def test_an_engine_with_wrong_answers_is_never_served(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    right = OnnxRuntimeEngine(builds.bundle, Settings(device="cpu"))
    files = {file.name: file for file in builds.bundle.path.iterdir() if file.name != "manifest.json"}
    manifest = builds.bundle.manifest
    bundle = write_bundle(builds.bundle.path, manifest, files | {"proof.npz": proof_bytes(proof_by(right))})
    assert read_bundle(bundle.path).manifest.hashes["proof"]
    builds.gate.touch()
    with builds.server(gate=True) as client:
        until(lambda: "the engine that was built is not used" in caplog.text, "the refusal")
        assert (detect(client), engine_of(client)) == (200, "onnxruntime")
    with builds.server(gate=True) as client:
        until(lambda: "it failed before: not served" in caplog.text, "it is remembered")
        assert engine_of(client) == "onnxruntime"
    assert len(builds.begun) == 1


def test_an_engine_that_comes_not_into_service_for_another_reason_is_kept(
    builds: Builds, caplog: pytest.LogCaptureFixture
) -> None:
    builds.gate.touch()
    with builds.server(swap_timeout_seconds=1e-6) as client:
        until(lambda: "is kept, but not in service: opening it takes longer" in caplog.text, "the end of the swap")
        assert engine_of(client) == "onnxruntime"
    assert not list(builds.cache.glob("*.failed"))
    with builds.server() as client:
        assert engine_of(client) == "tensorrt"
    assert len(builds.begun) == 1


def test_nothing_is_built_that_could_not_be_proven(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    with builds.server(gate=True) as client:
        until(lambda: "it carries no proof, without which none is served" in caplog.text, "the reason")
        assert engine_of(client) == "onnxruntime"
    assert builds.begun == []


def test_an_engine_of_another_tensorrt_is_built_anew(builds: Builds, tmp_path: Path) -> None:
    old = bundle_with(tmp_path / "old", "tensorrt-sm80-fp16.engine", version="9.3")
    files: dict[str, Path | bytes] = {path.name: path for path in old.path.iterdir() if path.name != "manifest.json"}
    builds.bundle = write_bundle(tmp_path / "whole", old.manifest, files | {"model.safetensors": b"w"})
    builds.gate.touch()
    with builds.server() as client:
        until(lambda: engine_of(client) == "tensorrt", "the switch")
    assert len(builds.begun) == 1


def test_onnx_runtime_stands_in_until_the_engine_in_half_is_built(builds: Builds) -> None:
    with builds.server(precision="fp16") as client:
        assert (detect(client), engine_of(client)) == (200, "onnxruntime")
        builds.gate.touch()
        until(lambda: engine_of(client) == "tensorrt", "the switch")


def test_a_build_may_say_much_in_one_line(builds: Builds) -> None:
    builds.trouble = "long line"
    builds.gate.touch()
    with builds.server() as client:
        until(lambda: engine_of(client) == "tensorrt", "the switch")


def test_nothing_is_built_unasked_or_where_there_is_an_engine(builds: Builds, tmp_path: Path) -> None:
    with builds.server(build_engine="never"):
        pass
    with builds.server(engine="onnxruntime"):
        pass
    with builds.server(device="cpu"):
        pass
    builds.bundle = bundle_with(tmp_path / "with", "tensorrt-sm80-fp16.engine")
    with builds.server() as client:
        assert engine_of(client) == "tensorrt"
    assert builds.begun == []


# --- the key, and what is kept ----------------------------------------------------------------------------------------


def test_the_key_tells_everything_apart_that_an_engine_depends_on(builds: Builds) -> None:
    gpu = Gpu(0, "Double 0", "sm80")
    recipe = recipe_for(builds.settings(), builds.bundle, gpu)
    assert recipe == recipe_for(builds.settings(engine_instances=3, port=9000), builds.bundle, replace(gpu, index=4))
    others = {
        recipe_for(builds.settings(max_batch_size=8), builds.bundle, gpu),
        recipe_for(builds.settings(precision="fp32"), builds.bundle, gpu),
        recipe_for(builds.settings(), builds.bundle, Gpu(0, "Another", "sm80")),
        recipe_for(builds.settings(), builds.bundle, Gpu(0, "Double 0", "sm86")),
        *(replace(recipe, **{name: "other"}) for name in ("checkpoint", "graph", "plugin", "tensorrt", "ddetr")),
        replace(recipe, flavour="rtx"),
        replace(recipe, canvases=("64x64",)),
    }
    assert len({recipe.key, *(other.key for other in others)}) == len(others) + 1 == 12


def test_an_engine_that_is_not_the_one_kept_is_none(builds: Builds, tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "kept")
    recipe = recipe_for(builds.settings(), builds.bundle, Gpu(0, "Double 0", "sm80"))
    assert cache.find(recipe) is None
    record, path = cache.keep(recipe, bundle_with(tmp_path / "built", "tensorrt-sm80-fp16.engine"))
    assert cache.find(recipe) == (record, path)
    assert cache.find(replace(recipe, max_batch_size=2)) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.find(recipe) is None
    cache.keep(recipe, bundle_with(tmp_path / "again", "tensorrt-sm80-fp16.engine"))
    assert cache.find(recipe) is not None
    marker = cache.give_up(recipe, "wrong boxes")
    assert (cache.find(recipe), cache.failure(recipe)) == (None, "wrong boxes")
    marker.unlink()
    assert cache.failure(recipe) is None


def test_one_at_a_time(builds: Builds, tmp_path: Path) -> None:
    recipe = recipe_for(builds.settings(), builds.bundle, Gpu(0, "Double 0", "sm80"))
    first, second = EngineCache(tmp_path / "kept"), EngineCache(tmp_path / "kept")
    with first.alone(recipe) as alone, second.alone(recipe) as other:
        assert (alone, other) == (True, False)
        with second.alone(replace(recipe, arch="sm86")) as another:
            assert another
    with second.alone(recipe) as alone:
        assert alone


def test_what_cannot_be_built_says_why(builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0, "Double 0", "sm80")
    bare = bundle_with(tmp_path / "bare")
    with pytest.raises(NoRecipe, match="bare carries no checkpoint to build from"):
        recipe_for(builds.settings(), bare, gpu)
    with pytest.raises(NoRecipe, match="int8 is for the CPU"):
        recipe_for(builds.settings(precision="int8"), builds.bundle, gpu)
    monkeypatch.setattr("plugins.tensorrt_library", lambda: None)
    with pytest.raises(NoRecipe, match="the TensorRT plugin was not built"):
        recipe_for(builds.settings(), builds.bundle, gpu)


def test_the_command_is_one_of_ddetr_build(builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.trt_build import _parser

    gpu = Gpu(1, "Double 1", "sm80")
    recipe = recipe_for(builds.settings(), builds.bundle, gpu)
    for visible, named in (("", "1"), ("4,6", "6")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        command = build_command(recipe, builds.bundle, gpu, tmp_path)
        assert command[:2] == ["env", f"CUDA_VISIBLE_DEVICES={named}"]
    arguments = command[command.index("export.trt_build") + 1 :]
    asked = _parser().parse_args(arguments)
    assert (asked.checkpoint, asked.output) == (builds.bundle.path, tmp_path / "bundle")
    assert (asked.precision, asked.flavour, asked.targets, asked.max_batch_size) == ("fp16", "tensorrt", ("sm80",), 4)
