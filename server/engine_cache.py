"""TensorRT engines that a server had built for its own GPU, kept by everything that they depend on.

A folder: KEY/ with the engine and its record; KEY.failed with why it could not be built, which is not tried again while
that file is there; KEY.lock, held by the server that builds it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

import plugins
from bundle import Bundle, EngineRecord
from bundle.reader import sha256_of
from runtime import Gpu, NotInstalled
from runtime.flavour import load_flavour
from server.settings import Settings
from server.version import version

_RECORD_FILE = "record.json"


class NoRecipe(Exception):
    """No engine can be built for this bundle here; the message says what is missing."""


@dataclass(frozen=True)
class Recipe:
    """Everything an engine depends on."""

    checkpoint: str  # SHA-256, as the others
    graph: str
    plugin: str
    flavour: str
    tensorrt: str  # its version
    ddetr: str
    gpu: str  # its name: kernels are chosen for it
    arch: str
    precision: str
    canvases: tuple[str, ...]
    max_batch_size: int

    @property
    def key(self) -> str:
        """A name that no other recipe has."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def recipe_for(settings: Settings, bundle: Bundle, gpu: Gpu) -> Recipe:
    """What the engine of this bundle for this GPU is made of. Raises NoRecipe."""
    if settings.precision == "int8":
        raise NoRecipe("precision int8 is for the CPU")
    if bundle.checkpoint_path is None:
        raise NoRecipe(f"{bundle.path} carries no checkpoint to build from (ddetr export --with-checkpoint)")
    library = plugins.tensorrt_library()
    if library is None:
        raise NoRecipe("the TensorRT plugin was not built (python -m plugins.build)")
    flavour, tensorrt = _installed()
    return Recipe(
        checkpoint=bundle.manifest.hashes.get("checkpoint") or sha256_of(bundle.checkpoint_path),
        graph=bundle.manifest.hashes["onnx"],
        plugin=sha256_of(library),
        flavour=flavour,
        tensorrt=tensorrt,
        ddetr=version(),
        gpu=gpu.name,
        arch=gpu.arch,
        precision="fp32" if settings.precision == "fp32" else "fp16",
        canvases=tuple(str(canvas) for canvas in bundle.manifest.canvases),
        max_batch_size=settings.max_batch_size,
    )


class EngineCache:
    """The folder. Several servers may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, recipe: Recipe) -> tuple[EngineRecord, Path] | None:
        """The record and the file of an engine; None where there is none, or not the one that was put there."""
        entry = self.folder / recipe.key
        try:
            record = EngineRecord.model_validate_json((entry / _RECORD_FILE).read_bytes())
            path = entry / record.file
            return (record, path) if sha256_of(path) == record.sha256 else None
        except (OSError, ValidationError):
            return None

    def keep(self, recipe: Recipe, bundle: Bundle) -> tuple[EngineRecord, Path]:
        """Put the engine that `bundle` has for the recipe in. Raises LookupError where it has none."""
        record = next(
            engine
            for engine in (*bundle.manifest.engines, None)
            if engine is None
            or (engine.flavour, engine.precision) == (recipe.flavour, recipe.precision)
            and engine.runs_on(recipe.arch)
        )
        if record is None:
            raise LookupError(f"{bundle.path} has no {recipe.precision} engine of {recipe.flavour} for {recipe.arch}")
        entry, fresh = self.folder / recipe.key, self.folder / f"{recipe.key}.partial"
        for stale in (fresh, entry):
            shutil.rmtree(stale, ignore_errors=True)
        fresh.mkdir(parents=True)
        shutil.copyfile(bundle.path / record.file, fresh / record.file)
        (fresh / _RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        fresh.rename(entry)
        return record, entry / record.file

    def failure(self, recipe: Recipe) -> str | None:
        """Why it could not be built, or was wrong."""
        try:
            return self._failed(recipe).read_text(encoding="utf-8").strip()
        except OSError:
            return None

    def give_up(self, recipe: Recipe, why: str) -> Path:
        """Do not build it again, nor use what was built, until the file that is returned is removed."""
        shutil.rmtree(self.folder / recipe.key, ignore_errors=True)
        path = self._failed(recipe)
        path.write_text(why + "\n", encoding="utf-8")
        return path

    def work(self, recipe: Recipe) -> Path:
        """A folder for what is under way."""
        return self.folder / f"{recipe.key}.work"

    @contextmanager
    def alone(self, recipe: Recipe) -> Iterator[bool]:
        """Whether no other server builds it; if so, none does until this is left, or the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / f"{recipe.key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def _failed(self, recipe: Recipe) -> Path:
        return self.folder / f"{recipe.key}.failed"


def _installed() -> tuple[str, str]:
    """The flavour of TensorRT that is installed, and its version. Raises NoRecipe."""
    reasons = []
    for flavour in ("tensorrt", "rtx"):
        try:
            return flavour, str(load_flavour(flavour).__version__)
        except NotInstalled as error:
            reasons.append(str(error))
    raise NoRecipe("; ".join(reasons))
