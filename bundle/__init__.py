"""The bundle: one exported model as a folder, its reader and its writer. Imports neither torch nor onnx."""

from bundle.embedded import embedded_bundle
from bundle.errors import (
    BundleError,
    BundleMissing,
    BundleOccupied,
    CanvasError,
    EngineMismatch,
    FormatUnknown,
    HashMismatch,
    ManifestInvalid,
)
from bundle.manifest import Agreement, EngineProfile, EngineRecord, Manifest, ModelName, ParityRecord, QuantisedRecord
from bundle.reader import Bundle, find_engine, read_bundle
from bundle.resize import Canvas, ResizeRule, canvases_for, choose_canvas, resized_size
from bundle.writer import write_bundle

__all__ = [
    "Agreement",
    "Bundle",
    "BundleError",
    "BundleMissing",
    "BundleOccupied",
    "Canvas",
    "CanvasError",
    "EngineMismatch",
    "EngineProfile",
    "EngineRecord",
    "FormatUnknown",
    "HashMismatch",
    "Manifest",
    "ManifestInvalid",
    "ModelName",
    "ParityRecord",
    "QuantisedRecord",
    "ResizeRule",
    "canvases_for",
    "choose_canvas",
    "embedded_bundle",
    "find_engine",
    "read_bundle",
    "resized_size",
    "write_bundle",
]
