"""`ddetr evaluate`: checkpoint to AP, by `training.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from cli.handover import hand_over


def run(argv: Sequence[str]) -> int:
    """Hand the arguments to `python -m training.evaluate`."""
    return hand_over("evaluate", "training.evaluate", extra="train", argv=argv)
