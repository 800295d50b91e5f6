import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import plugins
from bundle import Bundle, Canvas, write_bundle
from server.engine import RawDetections, candidates, open_engine, run_engine
from server.errors import StartupError
from server.metrics import Metrics
from server.onnxruntime_engine import OnnxRuntimeEngine, has_cuda_kernel
from server.preprocess import Pixels
from server.served import open_bundle
from server.settings import Settings
from tests.server.fake_engine import MANIFEST, FakeEngine, box_of_bright
from tests.server.tiny_bundle import LABEL, SCORE

WIDE = Canvas(height=64, width=96)
SECOND_TIMES = """
import numpy as np
from bundle import embedded_bundle, read_bundle
from server.engine import run_engine
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.settings import Settings

engine = OnnxRuntimeEngine(read_bundle(embedded_bundle()), Settings(bundle=embedded_bundle(), device="cpu"))
canvas = engine.manifest.canvases[0]
for turn in range(2):
    for images in (1, 2, 3, 4):
        run_engine(engine, [np.zeros((canvas.height, canvas.width, 3), np.uint8)] * images, canvas)
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_bundle, Settings(bundle=tiny_bundle.path, device="cpu"))


def native_threads() -> dict[int, int]:
    """The niceness of all threads of this process, Python's and others, by their ids."""
    threads = {}
    for name in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            threads[int(name)] = os.getpriority(os.PRIO_PROCESS, int(name))
    return threads


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, for at most ten seconds."""
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def image(seed: int, height: int, width: int) -> Pixels:
    """Black but for one bright rectangle."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.uint8)
    y0, x0 = int(rng.integers(0, height - 2)), int(rng.integers(0, width - 2))
    pixels[y0 : int(rng.integers(y0 + 1, height)), x0 : int(rng.integers(x0 + 1, width))] = 255
    return pixels


def test_the_graph_gives_the_box_of_what_is_bright(engine: OnnxRuntimeEngine) -> None:
    pixels = image(0, 64, 80)
    raw = run_engine(engine, [pixels], WIDE)
    assert raw.boxes.shape == (1, 1, 4)
    assert raw.boxes[0, 0] * [80, 64, 80, 64] == pytest.approx(box_of_bright(pixels[..., 0]), abs=1e-4)
    assert raw.scores.tolist() == [[SCORE]]
    assert raw.labels.tolist() == [[LABEL]]


def test_neighbours_do_not_change_an_answer(engine: OnnxRuntimeEngine) -> None:
    images = [image(seed, 64 - seed, 96 - 3 * seed) for seed in range(6)]
    together = run_engine(engine, images, WIDE)
    for slot, pixels in enumerate(images):
        alone = run_engine(engine, [pixels], WIDE)
        assert np.array_equal(alone.boxes[0], together.boxes[slot])
        assert np.array_equal(alone.scores[0], together.scores[slot])


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")
def test_a_second_batch_of_a_size_takes_no_more_memory_than_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_TIMES], capture_output=True, text=True, check=True)
    first_kib, second_kib = (int(line) for line in done.stdout.split())
    assert second_kib - first_kib < 2048


def test_it_says_what_it_runs_on(engine: OnnxRuntimeEngine) -> None:
    assert "onnxruntime" in engine.name
    assert "cpu" in engine.name
    assert ("native kernel" in engine.name) == (plugins.onnxruntime_library() is not None)
    assert engine.manifest == MANIFEST.model_copy(update={"hashes": engine.manifest.hashes})


def test_as_many_engines_as_are_asked_for(tiny_bundle: Bundle) -> None:
    settings = Settings(bundle=tiny_bundle.path, engine_instances=2)
    engines = open_bundle(settings, tiny_bundle.path, Metrics(), 0.0).engines
    assert len(engines) == 2
    assert len({id(each) for each in engines}) == 2
    for each in engines:
        assert len(run_engine(each, [image(1, 64, 64)], WIDE).boxes) == 1
        each.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux alone")
@pytest.mark.parametrize("niceness", [0, 7])
def test_its_threads_give_way_to_those_that_feed_it(tiny_bundle: Bundle, niceness: int) -> None:
    own, before = os.getpriority(os.PRIO_PROCESS, 0), native_threads()
    engine = OnnxRuntimeEngine(tiny_bundle, Settings(device="cpu", engine_threads=3, engine_niceness=niceness))
    wanted = [min(19, own + niceness)] * 2  # two of the three: the third is whoever calls `infer`
    until(lambda: len(native_threads().keys() - before.keys()) == 2)  # the thread that opened it has ended
    after = native_threads()
    assert [after[each] for each in after.keys() - before.keys()] == wanted
    assert all(after[each] == before[each] for each in after.keys() & before.keys())
    assert len(run_engine(engine, [image(1, 64, 64)], WIDE).boxes) == 1


def test_what_cannot_be_opened_says_why(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="tensorrt"):
        open_engine(Settings(bundle=tiny_bundle.path, engine="tensorrt"), tiny_bundle)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(StartupError, match="on cuda:3: this ONNX Runtime has no CUDA, only CPU"):
        open_engine(Settings(bundle=tiny_bundle.path, device="cuda:3"), tiny_bundle)
    broken = write_bundle(tmp_path / "broken", MANIFEST, {"model.onnx": b"not a graph"})
    with pytest.raises(StartupError, match=r"cannot load .*model\.onnx"):
        open_engine(Settings(bundle=broken.path), broken)


def test_a_graph_with_other_inputs_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["boxes"])],
        "other",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N"])],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    bundle = write_bundle(tmp_path / "other", MANIFEST, {"model.onnx": model.SerializeToString()})
    with pytest.raises(StartupError, match=r"inputs \['pixels'\] and outputs \['boxes'\]; a served graph has"):
        open_engine(Settings(bundle=bundle.path), bundle)


def test_a_library_that_cannot_be_loaded_is_named(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libother.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr("plugins.onnxruntime_library", lambda: library)
    with pytest.raises(StartupError, match=r"refuses .*libother\.so"):
        open_engine(Settings(bundle=tiny_bundle.path), tiny_bundle)


def test_without_the_library_the_function_answers(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("plugins.onnxruntime_library", lambda: None)
    engine = OnnxRuntimeEngine(tiny_bundle, Settings(bundle=tiny_bundle.path, device="cpu"))
    assert engine.name.endswith("MSDeformAttn as function")
    assert "make native" in caplog.text
    assert len(run_engine(engine, [image(1, 64, 64)], WIDE).boxes) == 1


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "message"),
    [
        ((2, 3, 4), (2, 3), (2, 3), None),
        ((1, 3, 4), (2, 3), (2, 3), r"boxes have shape \[1, 3, 4\], expected \[2, 3, 4\]"),
        ((2, 3, 5), (2, 3), (2, 3), "boxes have shape"),
        ((2, 3, 4), (1, 3), (2, 3), "scores have shape"),
        ((2, 3, 4), (2,), (2, 3), "have shape"),
        ((2, 3, 4), (2, 3), (2, 4), "labels have shape"),
    ],
)
def test_answers_of_the_wrong_shape_are_errors(
    boxes: tuple[int, ...], scores: tuple[int, ...], labels: tuple[int, ...], message: str | None
) -> None:
    class Shaped(FakeEngine):
        def infer(self, inputs: object) -> RawDetections:
            return RawDetections(np.zeros(boxes, np.float32), np.zeros(scores, np.float32), np.zeros(labels, np.int64))

    images = [image(1, 64, 96), image(2, 64, 96)]
    if message is None:
        run_engine(Shaped(), images, WIDE)
        return
    with pytest.raises(ValueError, match=message):
        run_engine(Shaped(), images, WIDE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_are_errors(value: float) -> None:
    class Infinite(FakeEngine):
        def finish(self, outputs: RawDetections) -> RawDetections:
            outputs.boxes[-1, -1, -1] = value
            return outputs

    with pytest.raises(ValueError, match="not finite"):
        run_engine(Infinite(), [image(1, 64, 96)], WIDE)


def test_inputs_bound_to_a_device_give_the_same_answers(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU: inputs copied when they are prepared, outputs bound. Here the device is the CPU."""
    settings = Settings(bundle=tiny_bundle.path, device="cpu")
    plain, bound = (OnnxRuntimeEngine(tiny_bundle, settings) for _ in range(2))
    monkeypatch.setattr(bound, "_placed", ("cpu", 0))
    images = [image(seed, 64, 90) for seed in range(3)]
    ahead = bound.prepare(images[:2], WIDE)
    other = bound.prepare(images[2:], WIDE)  # prepared while the first is not run yet
    for prepared, given in ((ahead, images[:2]), (other, images[2:])):
        raw, wanted = bound.finish(bound.infer(prepared)), run_engine(plain, given, WIDE)
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(raw, name), getattr(wanted, name))


def test_a_device_that_onnxruntime_does_not_take_is_an_error(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on, on the CPU, and say so in its own log alone."""
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr("server.onnxruntime_engine.has_cuda_kernel", lambda _: False)
    session = ort.InferenceSession
    asked: list[Any] = []

    def on_the_cpu(graph: Path, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
        asked.extend(providers)
        return session(graph, options, ["CPUExecutionProvider"])

    monkeypatch.setattr("onnxruntime.InferenceSession", on_the_cpu)
    with pytest.raises(StartupError, match=r"cuda:1: ONNX Runtime .* could not use it, and took CPUExecutionProvider"):
        open_engine(Settings(bundle=tiny_bundle.path, device="cuda:1", engine="onnxruntime"), tiny_bundle)
    [(provider, options)] = asked
    assert (provider, options["device_id"], options["use_tf32"]) == ("CUDAExecutionProvider", "1", "0")
    engine = open_engine(Settings(bundle=tiny_bundle.path, engine="onnxruntime"), tiny_bundle)
    assert " on cpu" in engine.name, "the next best, where the device may be chosen"


def test_the_library_tells_whether_it_has_the_kernel_for_cuda(tmp_path: Path) -> None:
    (tmp_path / "libother.so").write_bytes(b"not a library")
    assert not has_cuda_kernel(tmp_path / "libother.so")
    library, cuda = plugins.onnxruntime_library(), plugins.cuda_library()
    if library is None:
        pytest.skip("the native library is not built")
    assert has_cuda_kernel(library) == (cuda is not None), "both are built where nvcc is"


def test_the_precision_asked_for(tiny_bundle: Bundle) -> None:
    settings = Settings(bundle=tiny_bundle.path, device="cpu", precision="int8")
    with pytest.raises(StartupError, match="onnxruntime on cpu: the bundle has no graph of precision int8 for it"):
        candidates(settings, tiny_bundle)
    [found] = candidates(Settings(bundle=tiny_bundle.path, device="cpu", precision="fp32"), tiny_bundle)
    assert (found.name, found.precision) == ("onnxruntime on cpu", "fp32")
