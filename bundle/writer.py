"""Writing a bundle: beside its place, then renamed into it, so that no half-written bundle is ever seen."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bundle.errors import BundleMissing, BundleOccupied, HashMismatch
from bundle.manifest import Manifest, plain_file_name
from bundle.reader import HASHED_FILES, MANIFEST_FILE, ONNX_FILE, Bundle, read_bundle, sha256_of


def write_bundle(output: Path | str, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Bundle:
    """Write `files` (name to content, or to the file to copy) and the manifest as the bundle in folder `output`.

    The hashes of model.onnx and model.safetensors are filled in; one that the manifest already states must agree.
    A bundle already in `output` is replaced; any other content there is BundleOccupied. Returns the bundle as read
    back and validated.
    """
    output = Path(output).resolve()  # where `output` is a link, to what it leads to
    if ONNX_FILE not in files:
        raise BundleMissing(f"a bundle needs {ONNX_FILE}; given were {', '.join(sorted(files)) or 'no files'}")
    for name in files:
        if plain_file_name(name) == MANIFEST_FILE:
            raise ValueError(f"{MANIFEST_FILE} is written from the manifest, not from files")
    check_place(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        staging.chmod(0o755)
        for name, content in files.items():
            if isinstance(content, bytes):
                (staging / name).write_bytes(content)
            else:
                shutil.copyfile(content, staging / name)
        manifest = _with_hashes(manifest, staging)
        (staging / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        read_bundle(staging)
        for path in staging.iterdir():
            _flush(path)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return read_bundle(output)


def check_place(output: Path) -> None:
    """Raise BundleOccupied where `output` holds something that is no bundle: worth asking before a long export."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BundleOccupied(f"{output} is a file; a bundle is a folder")
    content = sorted(entry.name for entry in output.iterdir())
    # Both: many a thing has a manifest.json.
    missing = [name for name in (MANIFEST_FILE, ONNX_FILE) if name not in content]
    if content and missing:
        raise BundleOccupied(f"{output} holds {', '.join(content[:3])} and no {missing[0]}: not a bundle to replace")


def _with_hashes(manifest: Manifest, folder: Path) -> Manifest:
    hashes = dict(manifest.hashes)
    for name, file_name in HASHED_FILES.items():
        if not (folder / file_name).is_file():
            continue
        found = sha256_of(folder / file_name)
        if hashes.setdefault(name, found) != found:
            raise HashMismatch(f"{file_name}: SHA-256 is {found}, the manifest says {hashes[name]}")
    return manifest.model_copy(update={"hashes": hashes})


def _replace(staging: Path, output: Path) -> None:
    """Put `staging` in the place of `output`. On failure the old bundle is back in its place."""
    if not output.exists():
        staging.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old)  # over the empty folder: atomic on POSIX
    try:
        staging.rename(output)
    except BaseException:
        with suppress(OSError):
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
