"""What every checkpoint format is turned into: tensors under our names, and the facts stated beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what is wrong with it and names the key, value or file."""


def _same(name: str) -> str:
    return name


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors under the names of `DeformableDetr.state_dict()`.

    `facts` are fields of DeformableDetrConfig that the file states in words (its args or config), to be held against
    the shapes. `theirs` turns one of our names into the file's own, for messages.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    theirs: Callable[[str], str] = _same


def drop_alias(tensors: dict[str, Tensor], alias: str, prefix: str) -> bool:
    """Take the keys under `alias` for those under `prefix`, verified equal where both exist; True if there were any.

    Changes `tensors`. Raises CheckpointError naming the first pair that differs.
    """
    found = [key for key in tensors if key.startswith(alias)]
    for key in found:
        tensor = tensors.pop(key)
        real = prefix + key.removeprefix(alias)
        if not torch.equal(tensors.setdefault(real, tensor), tensor):
            raise CheckpointError(f"{key!r} and {real!r} are one tensor in this network, but their values differ")
    return bool(found)


def drop_shared_heads(tensors: dict[str, Tensor], refine: bool | None) -> bool:
    """Keep one head when all decoder layers share it; True if the heads are distinct (refinement).

    `refine` is what the file says, None where it does not: then equal values in all heads mean a shared one.
    Changes `tensors`. Raises CheckpointError when the heads differ although `refine` is False.
    """
    if refine:
        return True
    later = [key for key in tensors if key.startswith(("class_embed.", "bbox_embed.")) and key.split(".")[1] != "0"]
    for key in later:
        head, _, rest = key.split(".", 2)
        first = f"{head}.0.{rest}"
        if first in tensors and torch.equal(tensors[key], tensors[first]):
            continue
        if refine is None:
            return True
        raise CheckpointError(f"without box refinement all layers share one head, but {key!r} differs from {first!r}")
    for key in later:
        del tensors[key]
    return False
