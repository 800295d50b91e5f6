"""Reading a bundle: nothing is believed that the manifest's hashes do not confirm."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from bundle.errors import BundleMissing, EngineMismatch, FormatUnknown, HashMismatch, ManifestInvalid
from bundle.manifest import FORMAT_VERSION, EngineRecord, Manifest, QuantisedRecord

MANIFEST_FILE = "manifest.json"
ONNX_FILE = "model.onnx"
CHECKPOINT_FILE = "model.safetensors"
PROOF_FILE = "proof.npz"
HASHED_FILES = {"onnx": ONNX_FILE, "checkpoint": CHECKPOINT_FILE, "proof": PROOF_FILE}
"""Name in `Manifest.hashes` to the file it is of."""


@dataclass(frozen=True)
class Bundle:
    """A validated bundle on disk."""

    path: Path
    manifest: Manifest
    onnx_path: Path

    @property
    def checkpoint_path(self) -> Path | None:
        """The checkpoint the bundle was made from, if it carries it."""
        path = self.path / CHECKPOINT_FILE
        return path if path.is_file() else None

    @property
    def int8_path(self) -> Path | None:
        """The graph in 8-bit integers, if the bundle has one."""
        return None if self.manifest.int8 is None else self.path / self.manifest.int8.file


def read_bundle(path: Path | str) -> Bundle:
    """Read and validate the bundle in folder `path`.

    Raises BundleMissing, ManifestInvalid, FormatUnknown or HashMismatch; each names the file, what was expected
    and what was found.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleMissing(f"no bundle at {path}: {'not a folder' if path.exists() else 'no such folder'}")
    manifest = read_manifest(path / MANIFEST_FILE)
    onnx_path = path / ONNX_FILE
    if not onnx_path.is_file():
        raise BundleMissing(f"{onnx_path} does not exist; a bundle is {ONNX_FILE} and {MANIFEST_FILE}")
    if "onnx" not in manifest.hashes:
        raise ManifestInvalid(f"{path / MANIFEST_FILE}: hashes has no 'onnx'")
    if "proof" in manifest.hashes and not (path / PROOF_FILE).is_file():
        raise BundleMissing(f"{path / PROOF_FILE} does not exist; {MANIFEST_FILE} lists it")
    for name, file_name in HASHED_FILES.items():
        if name in manifest.hashes and (path / file_name).is_file():
            _check_hash(path / file_name, manifest.hashes[name])
    int8 = manifest.int8
    if int8 is not None and int8.of != manifest.hashes["onnx"]:
        raise HashMismatch(
            f"{path / int8.file} was made from another {ONNX_FILE} ({int8.of}): quantise the bundle again"
        )
    records: list[EngineRecord | QuantisedRecord] = [*manifest.engines, *filter(None, [int8])]
    for record in records:
        if not (path / record.file).is_file():
            raise BundleMissing(f"{path / record.file} does not exist; {MANIFEST_FILE} lists it")
        _check_hash(path / record.file, record.sha256)
    return Bundle(path=path, manifest=manifest, onnx_path=onnx_path)


def read_manifest(path: Path) -> Manifest:
    """The manifest in file `path`, checked for form but not against other files."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleMissing(f"{path} does not exist; a bundle is {ONNX_FILE} and {MANIFEST_FILE}") from error
    except (OSError, ValueError) as error:
        raise ManifestInvalid(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ManifestInvalid(f"{path}: expected an object, found {type(fields).__name__}")
    found = fields.get("format_version")
    if found != FORMAT_VERSION:
        raise FormatUnknown(f"{path}: format version {found!r}; this reader knows {FORMAT_VERSION}")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ManifestInvalid(f"{path}: {field}: {first['msg']}, found {first['input']!r:.200}") from error


def find_engine(bundle: Bundle, flavour: str, arch: str, precision: str | None = None) -> EngineRecord:
    """The bundle's engine for this flavour ("tensorrt", "rtx"), architecture ("sm80") and, if given, precision.

    Raises EngineMismatch naming the engines there are.
    """
    fitting = [
        engine
        for engine in bundle.manifest.engines
        if engine.flavour == flavour and engine.runs_on(arch) and precision in (None, engine.precision)
    ]
    if fitting:  # the one for the fewest others is the quickest
        return min(fitting, key=lambda engine: (engine.arch.endswith("+"), len(engine.targets)))
    wanted = "-".join(part for part in (flavour, arch, precision) if part)
    there = ", ".join(engine.file for engine in bundle.manifest.engines) or "none"
    raise EngineMismatch(f"{bundle.path} has no engine for {wanted}; it has {there}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise HashMismatch(f"{path}: SHA-256 is {found}, {MANIFEST_FILE} says {expected}")
