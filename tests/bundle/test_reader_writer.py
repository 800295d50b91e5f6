import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bundle import (
    BundleMissing,
    BundleOccupied,
    Canvas,
    EngineMismatch,
    EngineRecord,
    FormatUnknown,
    HashMismatch,
    Manifest,
    ManifestInvalid,
    ModelName,
    ParityRecord,
    ResizeRule,
    embedded_bundle,
    find_engine,
    read_bundle,
    write_bundle,
)
from bundle.reader import sha256_of

MANIFEST = Manifest(
    model=ModelName(name="cells", version="1"),
    variant="small",
    categories={0: "RBC", 7: "WBC"},
    resize=ResizeRule(shortest=64, longest=96),
    canvases=(Canvas(height=64, width=96),),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    max_detections=10,
    built_with={"torch": "2.0"},
    parity=(ParityRecord(canvas=Canvas(height=64, width=96), batch_size=3, max_box_error=1e-6, max_score_error=0.0),),
)


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = tmp_path / "best.safetensors"
    checkpoint.write_bytes(b"weights")
    files = {"model.onnx": b"graph", "model.safetensors": checkpoint, "README.md": b"card"}
    written = write_bundle(tmp_path / "a" / "b", MANIFEST, files)
    read = read_bundle(tmp_path / "a" / "b")
    assert read == written
    assert read.manifest.categories == {0: "RBC", 7: "WBC"}
    assert read.onnx_path.read_bytes() == b"graph"
    assert read.checkpoint_path is not None
    assert read.manifest.hashes["checkpoint"] == sha256_of(read.checkpoint_path)
    assert (read.path / "README.md").read_bytes() == b"card"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["b"]


def test_replaces_a_bundle_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"old", "notes.txt": b"old"})
    write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"new"})
    assert (tmp_path / "b" / "model.onnx").read_bytes() == b"new"
    assert sorted(entry.name for entry in (tmp_path / "b").iterdir()) == ["manifest.json", "model.onnx"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_failed_write_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"old"})
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"new", "model.safetensors": tmp_path / "absent"})
    assert read_bundle(tmp_path / "b").onnx_path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BundleOccupied, match="thesis.tex"):
        write_bundle(tmp_path, MANIFEST, {"model.onnx": b"graph"})
    with pytest.raises(BundleOccupied, match="is a file"):
        write_bundle(tmp_path / "thesis.tex", MANIFEST, {"model.onnx": b"graph"})
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_manifest_of_something_else_makes_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web application"}')
    (tmp_path / "index.html").write_text("precious")
    with pytest.raises(BundleOccupied, match="index.html"):
        write_bundle(tmp_path, MANIFEST, {"model.onnx": b"graph"})
    assert (tmp_path / "index.html").read_text() == "precious"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    write_bundle(tmp_path / "v1", MANIFEST, {"model.onnx": b"old"})
    (tmp_path / "current").symlink_to("v1")
    write_bundle(tmp_path / "current", MANIFEST, {"model.onnx": b"new"})
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "model.onnx").read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current", "v1"]


def test_names_stay_inside_the_folder(tmp_path: Path) -> None:
    for name in ("../x", "a/b", "..", "", "manifest.json"):
        with pytest.raises(ValueError, match="plain file name|written from the manifest"):
            write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"graph", name: b""})


def test_no_graph_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match=r"needs model.onnx; given were model.safetensors"):
        write_bundle(tmp_path / "b", MANIFEST, {"model.safetensors": b""})


def test_stated_hash_must_agree(tmp_path: Path) -> None:
    manifest = MANIFEST.model_copy(update={"hashes": {"onnx": "0" * 64}})
    with pytest.raises(HashMismatch, match="0000"):
        write_bundle(tmp_path / "b", manifest, {"model.onnx": b"graph"})


def test_changed_graph_is_noticed(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"graph"})
    bundle.onnx_path.write_bytes(b"grapf")
    with pytest.raises(HashMismatch, match=r"model\.onnx: SHA-256 is .* manifest.json says"):
        read_bundle(bundle.path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match="no such folder"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleMissing, match=r"manifest\.json does not exist"):
        read_bundle(tmp_path)
    bundle = write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"graph"})
    bundle.onnx_path.unlink()
    with pytest.raises(BundleMissing, match=r"model\.onnx does not exist"):
        read_bundle(bundle.path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format_version": 2}, FormatUnknown, "format version 2; this reader knows 1"),
        ({"canvases": []}, ManifestInvalid, "canvases"),
        ({"max_detections": "many"}, ManifestInvalid, "max_detections: .* found 'many'"),
        ({"surprise": 1}, ManifestInvalid, "surprise"),
        ({"hashes": {}}, ManifestInvalid, "hashes has no 'onnx'"),
    ],
)
def test_bad_manifest_names_field_and_value(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    bundle = write_bundle(tmp_path / "b", MANIFEST, {"model.onnx": b"graph"})
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        read_bundle(bundle.path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_garbage_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestInvalid, match=r"manifest\.json"):
        read_bundle(tmp_path)


def test_engines_are_checked_and_found(tmp_path: Path) -> None:
    digest = "f9d34fb1ca1c9e1f0c0a7ff6f2cf44dfb5d2ecd1ae4ee8ad0a1d2ac3d6e94b3d"
    engine = EngineRecord(file="rtx-sm86-fp16.engine", flavour="rtx", arch="sm86", precision="fp16", sha256=digest)
    manifest = MANIFEST.model_copy(update={"engines": (engine,)})
    with pytest.raises(BundleMissing, match="rtx-sm86-fp16.engine"):
        write_bundle(tmp_path / "b", manifest, {"model.onnx": b"graph"})
    with pytest.raises(HashMismatch, match="rtx-sm86-fp16.engine"):
        write_bundle(tmp_path / "b", manifest, {"model.onnx": b"graph", engine.file: b"engine"})
    (tmp_path / "engine").write_bytes(b"engine")
    engine = engine.model_copy(update={"sha256": sha256_of(tmp_path / "engine")})
    manifest = MANIFEST.model_copy(update={"engines": (engine,)})
    bundle = write_bundle(tmp_path / "b", manifest, {"model.onnx": b"graph", engine.file: tmp_path / "engine"})
    assert find_engine(bundle, "rtx", "sm86") == engine
    with pytest.raises(EngineMismatch, match=r"no engine for rtx-sm90-fp16; it has rtx-sm86-fp16\.engine"):
        find_engine(bundle, "rtx", "sm90", "fp16")


def test_the_engine_for_the_fewest_others_is_found(tmp_path: Path) -> None:
    def engine(arch: str, *targets: str) -> tuple[EngineRecord, bytes]:
        content = arch.encode()
        digest = hashlib.sha256(content).hexdigest()
        name = f"tensorrt-{arch}-fp16.engine"
        return EngineRecord(
            file=name, flavour="tensorrt", arch=arch, precision="fp16", sha256=digest, targets=targets
        ), content

    engines = [engine("sm80+", "sm80+"), engine("sm86-sm89", "sm86", "sm89"), engine("sm86")]
    manifest = MANIFEST.model_copy(update={"engines": tuple(record for record, _ in engines)})
    files = {record.file: content for record, content in engines}
    bundle = write_bundle(tmp_path / "b", manifest, {"model.onnx": b"graph", **files})
    found = {arch: find_engine(bundle, "tensorrt", arch).arch for arch in ("sm80", "sm86", "sm89", "sm120")}
    assert found == {"sm80": "sm80+", "sm86": "sm86", "sm89": "sm86-sm89", "sm120": "sm80+"}
    with pytest.raises(EngineMismatch, match="no engine for tensorrt-sm75"):
        find_engine(bundle, "tensorrt", "sm75")
    with pytest.raises(EngineMismatch, match="no engine for rtx-sm86"):
        find_engine(bundle, "rtx", "sm86")


def test_embedded_bundle_is_found_without_importing_torch() -> None:
    code = (
        "import sys, bundle; print(bundle.embedded_bundle()); assert not {'torch', 'onnx', 'models'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert Path(output.stdout.strip()) == embedded_bundle()
    assert embedded_bundle().name == "blood-cells"
