"""What an engine's layers have to be: the op a plugin in each attention, and each layer in the type it was given."""

from collections.abc import Mapping
from typing import Any

from export.build import PLUGIN_LAYER, SAMPLE_LAYER, LayerReport, NotBuilt

PLUGIN_INPUTS = {
    "fp32": ("float", "int64", "float", "float", "float"),
    "fp16": ("half", "int64", "float", "half", "half"),  # the third, reference points, is float in every precision
}
"""Precision -> types of a plugin layer's inputs."""

ALWAYS_FLOAT = ("NORMALIZATION", "SOFTMAX")
ALL_HALF = ("CONVOLUTION", PLUGIN_LAYER)  # in fp16
_WORKERS = ("CONVOLUTION", "MATRIX_MULTIPLY", PLUGIN_LAYER, *ALWAYS_FLOAT)


class LayersWrong(NotBuilt):
    """The network is not the one that was asked for; the message names the layers."""


def check_layers(report: LayerReport, attentions: int, precision: str) -> None:
    """Raise LayersWrong unless there are `attentions` plugin layers, no GridSample, and each type as it should be."""
    found, samples = report.count(PLUGIN_LAYER), report.count(SAMPLE_LAYER)
    if (found, samples) != (attentions, 0):
        raise LayersWrong(
            f"{attentions} attentions became {found} plugin layers and {samples} GridSample layers: "
            f"should be {attentions} and 0"
        )
    wanted = PLUGIN_INPUTS[precision]
    for number, types in enumerate(report.plugin_inputs):
        if types != wanted:
            raise LayersWrong(f"plugin layer {number} takes {', '.join(types)}; in {precision}: {', '.join(wanted)}")
    half = {kind for (kind, type_) in report.layers if type_ == "half"}
    if precision == "fp32" and half:
        raise LayersWrong(f"half layers in a network of fp32: {', '.join(sorted(half))}")
    if precision == "fp16":
        for kind in ALL_HALF:
            if report.count(kind, "half") != report.count(kind):
                raise LayersWrong(f"{report.count(kind, 'half')} of {report.count(kind)} {kind} layers are half")
        for kind in ALWAYS_FLOAT:
            if report.count(kind, "half"):
                raise LayersWrong(f"{report.count(kind, 'half')} {kind} layers are half; all should be float")


def described(report: LayerReport) -> list[str]:
    """Lines: the plugin's count and types, and of the layers that compute, how many are half and how many float."""
    types = sorted({" ".join(types) for types in report.plugin_inputs})
    lines = [
        f"{report.total} layers, {report.count(PLUGIN_LAYER)} plugin, {report.count(SAMPLE_LAYER)} GridSample; "
        f"plugin inputs: {' or '.join(types)}"
    ]
    for type_ in ("half", "float"):
        counts = [f"{report.count(kind, type_)} {kind}" for kind in _WORKERS if report.count(kind, type_)]
        lines.append(f"{type_}: {', '.join(counts) or 'none'}")
    return lines


def to_json(report: LayerReport) -> dict[str, Any]:
    """A report as JSON has it; `from_json` gives it back."""
    layers = [[kind, type_, count] for (kind, type_), count in sorted(report.layers.items())]
    return {"layers": layers, "plugin_inputs": [list(types) for types in report.plugin_inputs]}


def from_json(fields: Mapping[str, Any]) -> LayerReport:
    """The report that `to_json` wrote."""
    layers = {(kind, type_): count for kind, type_, count in fields["layers"]}
    return LayerReport(layers, tuple(tuple(types) for types in fields["plugin_inputs"]))
