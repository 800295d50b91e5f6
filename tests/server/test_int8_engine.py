"""precision=int8: the bundle's graph in integers on the CPU, where the CPU computes it as it was measured."""

import shutil
from pathlib import Path

import pytest

from bundle import Agreement, Bundle, QuantisedRecord, read_bundle, write_bundle
from bundle.reader import sha256_of
from server.cores import sums_bytes_exactly
from server.engine import candidates, open_engine, passed_over
from server.errors import StartupError
from server.settings import Settings


@pytest.fixture
def quantised(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle whose second graph is the first under another name."""
    int8 = shutil.copy(tiny_bundle.onnx_path, tmp_path / "model-int8.onnx")
    record = QuantisedRecord(
        file="model-int8.onnx", sha256=sha256_of(int8), of=tiny_bundle.manifest.hashes["onnx"], pictures=1, ap_fp32=0.5,
        ap_int8=0.5, ap50_fp32=0.9, ap50_int8=0.9, calibration_pictures=1,
        agreement=Agreement(detections=1, threshold=0.5, matched=1, score_difference=0),
    )  # fmt: skip
    files = {path.name: path for path in [*tiny_bundle.path.iterdir(), int8] if path.name != "manifest.json"}
    return write_bundle(tmp_path / "bundle", tiny_bundle.manifest.model_copy(update={"int8": record}), files)


def test_only_who_asks_for_integers_gets_them(quantised: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.onnxruntime_engine.sums_bytes_exactly", lambda: True)
    settings = Settings(bundle=quantised.path, device="cpu", precision="int8")
    [found] = candidates(settings, quantised)
    assert found.precision == "int8"
    engine = open_engine(settings, quantised)
    assert "model-int8.onnx" in engine.name
    engine.close()
    [found] = candidates(Settings(bundle=quantised.path, device="cpu"), quantised)
    assert found.precision == "fp32"


def test_a_cpu_that_would_answer_otherwise_is_told(quantised: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.onnxruntime_engine.sums_bytes_exactly", lambda: False)
    settings = Settings(bundle=quantised.path, device="cpu", precision="int8")
    assert passed_over(settings, quantised) == (
        "onnxruntime on cpu: int8 needs a CPU with VNNI: without it sums of 8-bit products overflow",
    )
    with pytest.raises(StartupError, match="VNNI"):
        open_engine(settings, quantised)


def test_a_bundle_without_its_graph_in_integers_is_not_read(quantised: Bundle) -> None:
    path = quantised.int8_path
    assert path is not None
    path.unlink()
    with pytest.raises(Exception, match=r"model-int8\.onnx does not exist; manifest\.json lists it"):
        read_bundle(quantised.path)


@pytest.mark.parametrize(
    ("info", "exact"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("flags : fpu avx2 avx_vnni\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("processor : 0\nFeatures : fp asimd asimddp\n", True),
    ],
)
def test_what_the_processor_says(info: str, exact: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    assert sums_bytes_exactly(tmp_path / "cpuinfo") is exact
    assert sums_bytes_exactly(tmp_path / "absent")
