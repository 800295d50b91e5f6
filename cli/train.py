"""`ddetr train`: data to checkpoint, by `training.train`."""

from __future__ import annotations

from collections.abc import Sequence

from cli.handover import hand_over


def run(argv: Sequence[str]) -> int:
    """Hand the arguments to `python -m training.train`."""
    return hand_over("train", "training.train", extra="train", argv=argv)
