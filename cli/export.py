"""`ddetr export`: checkpoint to bundle, by `export.onnx_export`."""

from __future__ import annotations

from collections.abc import Sequence

from cli.handover import hand_over


def run(argv: Sequence[str]) -> int:
    """Hand the arguments to `python -m export.onnx_export`."""
    return hand_over("export", "export.onnx_export", extra="export", argv=argv)
