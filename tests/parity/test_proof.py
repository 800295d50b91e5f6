"""proof.npz: written and read, whole or refused; and carried by a bundle as its hash says."""

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle import BundleMissing, Canvas, HashMismatch, embedded_bundle, read_bundle, write_bundle
from bundle.reader import MANIFEST_FILE, PROOF_FILE
from parity import Expected, Proof, ProofInvalid, read_proof
from parity.pictures import draw_pictures
from parity.proof import CanvasProof, pictures_hash, proof_bytes, proof_from

CANVAS = Canvas(height=32, width=64)


def small_proof() -> Proof:
    seeds = (3, 5)
    boxes = np.array([[0.1, 0.2, 0.3, 0.4], [0, 0.5, 0.25, 1]], np.float32)
    expected = Expected(
        boxes, np.array([0.9, 0.125], np.float32), np.array([7, 90]), {"a fault": np.full((2, 4), 3e-4, np.float32)}
    )
    part = CanvasProof(CANVAS, seeds, pictures_hash(draw_pictures(CANVAS, seeds)), (expected, expected))
    return Proof((part,), 2, (7, 90), {"curve": 0.25})


def test_what_is_written_is_read() -> None:
    proof = small_proof()
    read = proof_from(proof_bytes(proof))
    assert (read.detections, read.categories, read.half) == (2, (7, 90), {"curve": 0.25})
    (part,), (written,) = read.canvases, proof.canvases
    assert (part.canvas, part.seeds, part.sha256) == (written.canvas, written.seeds, written.sha256)
    for one, other in zip(part.expected, written.expected, strict=True):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.signatures["a fault"], other.signatures["a fault"], atol=1e-6)


def test_the_same_proof_is_the_same_bytes() -> None:
    assert proof_bytes(small_proof()) == proof_bytes(proof_from(proof_bytes(small_proof())))


@pytest.mark.parametrize("content", [b"", b"not a zip", proof_bytes(small_proof())[:400]])
def test_what_is_no_proof_is_refused(content: bytes) -> None:
    with pytest.raises(ProofInvalid, match="not a proof"):
        proof_from(content)


def test_a_member_of_another_shape_is_refused() -> None:
    source = zipfile.ZipFile(io.BytesIO(proof_bytes(small_proof())))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in source.namelist():
            shorter = io.BytesIO()
            np.save(shorter, np.zeros(1, np.float32))
            file.writestr(name, shorter.getvalue() if name == "0.1.scores.npy" else source.read(name))
    with pytest.raises(ProofInvalid, match=r"picture 0\.1: boxes \(2, 4\), scores \(1,\)"):
        proof_from(content.getvalue())


@pytest.mark.parametrize(
    ("half", "message"),
    [
        ({"curve": float("inf")}, "must be finite"),
        ({"curve": None}, "not a proof"),
        ({"curve": "much"}, "not a proof"),
    ],
    ids=["without end", "nothing", "a word"],
)
def test_limits_follow_numbers_alone(half: Any, message: str) -> None:
    with pytest.raises(ProofInvalid, match=message):
        proof_from(proof_bytes(dataclasses.replace(small_proof(), half=half)))


def test_pickled_content_is_never_loaded() -> None:
    content = io.BytesIO()
    np.savez(content, head=np.array([{"format_version": 1}], dtype=object))
    with pytest.raises(ProofInvalid, match="not a proof"):
        proof_from(content.getvalue())


def test_pictures_that_are_not_the_same_any_more_are_refused() -> None:
    (part,) = small_proof().canvases
    with pytest.raises(ProofInvalid, match=r"canvas 32x64, seeds \(3, 5\).*another release"):
        dataclasses.replace(part, sha256="0" * 64).pictures()
    assert part.pictures().images.shape == (2, 32, 64, 3)


def test_the_embedded_bundle_carries_a_small_proof_of_every_canvas() -> None:
    bundle = read_bundle(embedded_bundle())
    proof = read_proof(bundle)
    assert proof is not None
    assert tuple(part.canvas for part in proof.canvases) == bundle.manifest.canvases
    assert proof.detections == bundle.manifest.max_detections
    assert set(proof.categories) == set(bundle.manifest.categories)
    assert (bundle.path / PROOF_FILE).stat().st_size < 200_000
    for part in proof.canvases:
        assert part.pictures().sizes.shape == (4, 2)
    assert proof.canvases[0].expected[0].signatures


def copy_of_embedded(folder: Path, without: str = "") -> Path:
    source = embedded_bundle()
    files = {path.name: path for path in source.iterdir() if path.name not in (MANIFEST_FILE, without)}
    manifest = read_bundle(source).manifest
    hashes = {name: digest for name, digest in manifest.hashes.items() if name != "proof"}
    write_bundle(folder, manifest.model_copy(update={"hashes": hashes}), files)
    return folder


def test_a_bundle_without_a_proof_can_be_read(tmp_path: Path) -> None:
    bundle = read_bundle(copy_of_embedded(tmp_path / "bundle", without=PROOF_FILE))
    assert "proof" not in bundle.manifest.hashes
    assert read_proof(bundle) is None


def test_a_proof_that_is_lost_or_changed_is_said(tmp_path: Path) -> None:
    folder = copy_of_embedded(tmp_path / "bundle")
    proof = folder / PROOF_FILE
    content = proof.read_bytes()
    proof.write_bytes(content[:-1] + b"\1")
    with pytest.raises(HashMismatch, match=r"proof\.npz"):
        read_bundle(folder)
    proof.unlink()
    with pytest.raises(BundleMissing, match=r"proof\.npz does not exist"):
        read_bundle(folder)
