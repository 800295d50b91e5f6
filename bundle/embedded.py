"""Where the model that comes with the project lies."""

import importlib.util
from pathlib import Path

from bundle.errors import BundleMissing

EMBEDDED_NAME = "blood-cells"


def embedded_bundle() -> Path:
    """Folder of the embedded bundle, package data of `models`; found without importing that package (or torch)."""
    spec = importlib.util.find_spec("models")
    if spec is None or not spec.submodule_search_locations:
        raise BundleMissing(
            "the package 'models', which carries the embedded bundle, is not installed; name a bundle folder instead"
        )
    return Path(spec.submodule_search_locations[0]) / EMBEDDED_NAME
