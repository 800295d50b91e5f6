"""proof.npz: the pictures a bundle is tried on, by their seeds, and what float32 PyTorch says to each.

An answer does not depend on its neighbours, so what is expected is a picture's own; batches are made of them in turn.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import Bundle, Canvas
from bundle.reader import PROOF_FILE
from parity.pictures import Pictures, draw_pictures

FORMAT_VERSION = 1
SIGNATURE_UNITS = 1e6
"""A signature is stored in 16-bit integers, in millionths of the image's side."""


class ProofInvalid(ValueError):
    """The file is no proof, or its pictures cannot be drawn as they were; the message says which and why."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What PyTorch says to one picture: its candidates, more of them than an engine returns, in descending score.

    boxes float32 [M, 4] x0, y0, x1, y1 in 0..1 of the image, scores float32 [M], labels int64 [M]. signatures: by the
    name of a known fault, how it moves these boxes: float32 [M, 4].
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    signatures: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CanvasProof:
    """The pictures of one canvas: each one's seed, the SHA-256 of all, and each one's answer."""

    canvas: Canvas
    seeds: tuple[int, ...]
    sha256: str
    expected: tuple[Expected, ...]

    def pictures(self) -> Pictures:
        """Drawn anew. Raises ProofInvalid where they are not the ones that PyTorch was shown."""
        pictures = draw_pictures(self.canvas, self.seeds)
        if (found := pictures_hash(pictures)) != self.sha256:
            raise ProofInvalid(
                f"the pictures of canvas {self.canvas}, seeds {self.seeds}, have SHA-256 {found}, the proof says "
                f"{self.sha256}: made by another release; export the bundle again"
            )
        return pictures


@dataclass(frozen=True, eq=False)
class Proof:
    """A bundle's proof.

    detections: K, how many an engine returns of an image. categories: the labels there are. half: for each figure of
    `parity.limits`, how far arithmetic in half precision moves it in this network, as measured on these pictures.
    integers: the same of the bundle's graph in 8 bits; it is in the bundle's manifest, not in the file.
    """

    canvases: tuple[CanvasProof, ...]
    detections: int
    categories: tuple[int, ...]
    half: Mapping[str, float] = field(default_factory=dict)
    integers: Mapping[str, float] = field(default_factory=dict)


def pictures_hash(pictures: Pictures) -> str:
    """SHA-256 over sizes and pixels, in hexadecimal."""
    digest = hashlib.sha256(pictures.sizes.astype("<i8").tobytes())
    digest.update(pictures.images.tobytes())
    return digest.hexdigest()


def read_proof(bundle: Bundle) -> Proof | None:
    """The bundle's proof, or None where it carries none. Raises ProofInvalid."""
    path = bundle.path / PROOF_FILE
    if "proof" not in bundle.manifest.hashes or not path.is_file():
        return None
    record = bundle.manifest.int8
    try:
        return replace(proof_from(path.read_bytes()), integers={} if record is None else record.noise)
    except ProofInvalid as error:
        raise ProofInvalid(f"{path}: {error}") from error


def proof_from(content: bytes) -> Proof:
    """The proof that `proof_bytes` wrote. Raises ProofInvalid."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            head: dict[str, Any] = json.loads(arrays["head"].tobytes())
            if head["format_version"] != FORMAT_VERSION:
                raise ProofInvalid(f"format version {head['format_version']}; this reader knows {FORMAT_VERSION}")
            canvases = tuple(
                CanvasProof(
                    Canvas(height=entry["height"], width=entry["width"]),
                    tuple(entry["seeds"]),
                    entry["sha256"],
                    tuple(
                        _read_expected(arrays, f"{number}.{index}", entry["signatures"])
                        for index in range(len(entry["seeds"]))
                    ),
                )
                for number, entry in enumerate(head["canvases"])
            )
        half = {name: float(figure) for name, figure in head["half"].items()}
        if not np.isfinite(list(half.values())).all():
            raise ProofInvalid(f"what half precision does must be finite: {half}")
        return Proof(canvases, int(head["detections"]), tuple(head["categories"]), half)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if isinstance(error, ProofInvalid):
            raise
        raise ProofInvalid(f"not a proof: {type(error).__name__}: {error}") from error


def _read_expected(arrays: Mapping[str, NDArray[Any]], name: str, faults: Sequence[str]) -> Expected:
    signatures = {fault: (arrays[f"{name}.{fault}"] / SIGNATURE_UNITS).astype(np.float32) for fault in faults}
    boxes, scores, labels = (arrays[f"{name}.{part}"] for part in ("boxes", "scores", "labels"))
    count = scores.shape[0] if scores.ndim == 1 else -1
    if {boxes.shape, *(moved.shape for moved in signatures.values())} != {(count, 4)} or labels.shape != (count,):
        raise ProofInvalid(f"picture {name}: boxes {boxes.shape}, scores {scores.shape}, labels {labels.shape}")
    return Expected(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), signatures)


def proof_bytes(proof: Proof) -> bytes:
    """The file's content; the same for the same proof."""
    entries = [
        {
            "height": part.canvas.height,
            "width": part.canvas.width,
            "seeds": list(part.seeds),
            "sha256": part.sha256,
            "signatures": list(part.expected[0].signatures),
        }
        for part in proof.canvases
    ]
    head = {
        "format_version": FORMAT_VERSION,
        "detections": proof.detections,
        "categories": list(proof.categories),
        "half": dict(proof.half),
        "canvases": entries,
    }
    arrays: dict[str, NDArray[Any]] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
    for number, part in enumerate(proof.canvases):
        for index, expected in enumerate(part.expected):
            arrays[f"{number}.{index}.boxes"] = expected.boxes.astype(np.float32)
            arrays[f"{number}.{index}.scores"] = expected.scores.astype(np.float32)
            arrays[f"{number}.{index}.labels"] = expected.labels.astype(np.int32)
            for fault, moved in expected.signatures.items():
                arrays[f"{number}.{index}.{fault}"] = (
                    (moved * SIGNATURE_UNITS).round().clip(-32767, 32767).astype(np.int16)
                )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            # Not np.savez, which writes the time of day.
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
    return content.getvalue()
