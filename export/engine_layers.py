"""What a built engine says of its own layers; only a GPU that runs it can ask."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from export.layers import LayersWrong

_NAMES = {"half": ("half", "fp16"), "float": ("float", "fp32")}  # releases differ in how they call a type


@dataclass(frozen=True)
class BuiltLayers:
    """Of an engine's layers: all, those of plugins, and those whose first output is half or float, where it says so."""

    total: int
    plugins: int
    halves: int
    floats: int

    @property
    def line(self) -> str:
        """In words."""
        counts = f"{self.total} layers, {self.plugins} plugin, {self.halves} half, {self.floats} float"
        return f"the engine's own report: {counts}"


def read_layers(information: str) -> BuiltLayers:
    """What TensorRT's inspector told as JSON. Raises ValueError for what is none."""
    try:
        layers = json.loads(information)["Layers"]
        told = [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]  # names alone, undetailed
        types = Counter(_type(layer) for layer in told)
        plugins = sum("plugin" in str(layer.get("LayerType", "")).lower() for layer in told)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the engine's own report cannot be read: {type(error).__name__}: {error}") from error
    return BuiltLayers(len(told), plugins, types["half"], types["float"])


def check_built(layers: BuiltLayers, precision: str) -> None:
    """Raise LayersWrong where the engine says that it is another than was asked for; what it does not say, passes."""
    if not layers.halves and not layers.floats:
        return
    if not layers.plugins:
        raise LayersWrong(f"{layers.line}; the op should be a plugin")
    if bool(layers.halves) != (precision == "fp16"):
        raise LayersWrong(f"{layers.line}; it was to be {precision}")


def _type(layer: dict[str, Any]) -> str:
    told = [str(output.get("Format/Datatype", "")).lower() for output in layer.get("Outputs", ())[:1]]
    return next((name for name, words in _NAMES.items() for text in told if any(word in text for word in words)), "")
