"""`ddetr export`: checkpoint to bundle, by `export.onnx_export`; with `--int8` its integers, by `cli.quantise`."""

from __future__ import annotations

from collections.abc import Sequence

from cli.handover import hand_over


def run(argv: Sequence[str]) -> int:
    """Hand the arguments to `python -m export.onnx_export`, or to the module that quantises."""
    if "--int8" in argv:
        return hand_over("export", "cli.quantise", extra="export,train", argv=argv)
    return hand_over("export", "export.onnx_export", extra="export", argv=argv)
