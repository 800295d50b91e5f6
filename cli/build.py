"""`ddetr build`: checkpoint to a bundle with a TensorRT engine, by `export.trt_build`."""

from __future__ import annotations

from collections.abc import Sequence

from cli.handover import hand_over


def run(argv: Sequence[str]) -> int:
    """Hand the arguments to `python -m export.trt_build`."""
    return hand_over("build", "export.trt_build", extra="export", argv=argv)
