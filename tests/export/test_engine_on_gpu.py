"""On a GPU: small engines are built, and the server's held against ONNX Runtime. Not run anywhere yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import plugins
from bundle import Bundle
from export.engine_bundle import Request, build_engine
from runtime import RuntimeUnavailable, gpus
from runtime.flavour import load_flavour
from server.app import create_app
from server.engine import Engine, open_engine, run_engine
from server.settings import Settings
from tests.export.conftest import Exported
from tests.export.small import CANVASES
from tests.server.pictures import encode, rectangle

MOST = 4
ATOL = {"fp32": 2e-3, "fp16": 3e-2}  # of scores; guesses, to be put right where the test first runs
TF32 = "NVIDIA_TF32_OVERRIDE"  # cuDNN's and cuBLAS's own rounding of float32 is off: 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(plugins.tensorrt_library() is None, reason="the TensorRT plugin was not built"),
]


@pytest.fixture(scope="module", params=[(f, p) for f in ("tensorrt", "rtx") for p in ("fp32", "fp16")], ids="-".join)
def built(
    request: pytest.FixtureRequest, exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, str]:
    """A bundle with an engine for this machine's first GPU, and the engine's precision."""
    flavour, precision = request.param
    try:
        load_flavour(flavour)
        target = gpus()[0].arch
    except RuntimeUnavailable as error:
        pytest.skip(str(error))
    folder: Path = tmp_path_factory.mktemp("engine") / "bundle"
    bundle = build_engine(
        Request(
            exported("r50-two-stage").checkpoint,
            folder,
            precision=precision,
            flavour=flavour,
            targets=(target,),
            canvases=CANVASES,
            typical_batch_size=2,
            max_batch_size=MOST,
        )
    )
    return bundle, precision


def engines(bundle: Bundle) -> tuple[Engine, Engine]:
    settings = Settings(bundle=bundle.path, max_batch_size=MOST)
    on_gpu = open_engine(settings.model_copy(update={"engine": "tensorrt"}), bundle)
    return on_gpu, open_engine(settings.model_copy(update={"engine": "onnxruntime", "device": "cpu"}), bundle)


def test_its_answers_are_onnxruntimes(built: tuple[Bundle, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TF32, "0")
    bundle, precision = built
    on_gpu, reference = engines(bundle)
    assert on_gpu.name.endswith(f"{precision}, CUDA graphs")
    random = np.random.default_rng(0)
    for canvas in CANVASES:
        for count in (1, MOST, 2, 1, MOST):
            sides = [(int(random.integers(32, canvas.height + 1)), int(random.integers(32, canvas.width + 1)))] * count
            images = [random.integers(0, 255, (*side, 3), dtype=np.uint8) for side in sides]
            got, wanted = run_engine(on_gpu, images, canvas), run_engine(reference, images, canvas)
            np.testing.assert_allclose(got.scores, wanted.scores, atol=ATOL[precision])
            best = wanted.scores[:, 0] - wanted.scores[:, 1] > 4 * ATOL[precision]  # those whose order is sure
            np.testing.assert_allclose(got.boxes[best, 0], wanted.boxes[best, 0], atol=10 * ATOL[precision])
            np.testing.assert_array_equal(got.labels[best, 0], wanted.labels[best, 0])
    on_gpu.close()
    reference.close()


def test_one_batch_is_copied_while_another_is_computed(built: tuple[Bundle, str]) -> None:
    """The same bits as one after the other."""
    bundle, _ = built
    engine, _ = engines(bundle)
    random = np.random.default_rng(1)
    batches = [[random.integers(0, 255, (64, 96, 3), dtype=np.uint8) for _ in range(1 + i % MOST)] for i in range(32)]
    alone = [run_engine(engine, images, CANVASES[0]) for images in batches]
    ahead = engine.prepare(batches[0], CANVASES[0])
    for index, wanted in enumerate(alone):
        running = engine.infer(ahead)
        if index + 1 < len(batches):
            ahead = engine.prepare(batches[index + 1], CANVASES[0])
        got = engine.finish(running)
        np.testing.assert_array_equal(got.boxes, wanted.boxes)
        np.testing.assert_array_equal(got.scores, wanted.scores)
    engine.close()


def test_a_server_proves_it_and_serves_it(built: tuple[Bundle, str]) -> None:
    bundle, _ = built
    settings = Settings(bundle=bundle.path, max_batch_size=MOST, engine="tensorrt", on_parity_failure="refuse")
    with TestClient(create_app(settings)) as client:
        assert client.get("/model").json()["gate"][0]["result"] == "passed"
        parts = [("images", (f"{i}.png", encode(rectangle()), "image/png")) for i in range(20)]
        answers = client.post("/detect?threshold=0.01", files=parts).json()["images"]
    assert len(answers) == 20
    assert all("error" not in answer for answer in answers)
