"""Small networks of every variant, each exported once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from bundle import Bundle
from export.onnx_export import Request, export
from models import DeformableDetr, save_checkpoint
from tests.export.small import CANVASES, build, small


@dataclass(frozen=True)
class Exported:
    model: DeformableDetr
    checkpoint: Path
    bundle: Bundle
    said: tuple[str, ...]

    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.bundle.onnx_path)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A variant's name -> its small network, exported with verification."""
    done: dict[str, Exported] = {}

    def one(variant: str) -> Exported:
        if variant not in done:
            folder = tmp_path_factory.mktemp(variant)
            model = build(small(variant))
            save_checkpoint(model, folder / "weights.safetensors")
            said: list[str] = []
            request = Request(
                folder / "weights.safetensors", folder / "bundle", name="cells", model_version="7", canvases=CANVASES
            )
            bundle = export(request, said.append)
            done[variant] = Exported(model, request.checkpoint, bundle, tuple(said))
        return done[variant]

    return one
