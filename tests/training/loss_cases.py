"""Outputs of a network and objects to compare them with, that any program can make again from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.models.seeded import seeded_array
from training.matcher import Target


@dataclass(frozen=True)
class LossCase:
    """What a batch is like; `objects` of each image."""

    objects: tuple[int, ...]
    queries: int
    classes: int
    earlier_layers: int
    proposals: int = 0  # pixels of the encoder's output; 0: not two-stage
    spread: float = 1.0  # of the logits


CASES = {
    "plain": LossCase(objects=(4, 0, 9), queries=20, classes=7, earlier_layers=2),
    "two-stage": LossCase(objects=(6, 1), queries=30, classes=3, earlier_layers=5, proposals=80),
    "coco": LossCase(objects=(12, 3), queries=60, classes=91, earlier_layers=1, proposals=100),
    "nothing to find": LossCase(objects=(0, 0), queries=10, classes=5, earlier_layers=1, proposals=20),
    "more objects than queries": LossCase(objects=(8, 2), queries=5, classes=4, earlier_layers=1),
    "sure of itself": LossCase(objects=(3, 5), queries=15, classes=4, earlier_layers=1, spread=12.0),
}


def _boxes(name: str, *shape: int) -> Tensor:
    """cx, cy, w, h within 0..1, of all sizes down to a hundredth."""
    raw = torch.from_numpy(seeded_array(name, (*shape, 4))) / 12**0.5 + 0.5  # uniform in 0..1
    size = 0.01 + 0.6 * raw[..., 2:] ** 2
    centre = size / 2 + (1 - size) * raw[..., :2]
    return torch.cat([centre, size], dim=-1)


def _layer(name: str, case: LossCase, queries: int) -> dict[str, Tensor]:
    images = len(case.objects)
    logits = torch.from_numpy(seeded_array(f"{name} logits", (images, queries, case.classes))) * case.spread - 1
    return {
        "pred_logits": logits.requires_grad_(),
        "pred_boxes": _boxes(f"{name} boxes", images, queries).requires_grad_(),
    }


def make_case(name: str) -> tuple[dict[str, Any], list[Target]]:
    """A network's outputs in training mode (leaves that want gradients) and the targets."""
    case = CASES[name]
    outputs: dict[str, Any] = _layer(f"{name} last", case, case.queries)
    outputs["aux_outputs"] = [_layer(f"{name} {i}", case, case.queries) for i in range(case.earlier_layers)]
    if case.proposals:
        proposals = _layer(f"{name} enc", case, case.proposals)
        with torch.no_grad():
            proposals["pred_boxes"][:, :5] = 1.0  # what the network gives for pixels that propose nothing
        outputs["enc_outputs"] = proposals
    targets = []
    for image, count in enumerate(case.objects):
        drawn = torch.from_numpy(seeded_array(f"{name} labels {image}", (count,))) / 12**0.5 + 0.5
        labels = (drawn * case.classes).long().clamp(0, case.classes - 1)
        targets.append({"labels": labels, "boxes": _boxes(f"{name} objects {image}", count)})
    return outputs, targets


def layers_of(outputs: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Every layer of the outputs by the suffix of its losses' names."""
    layers = {"": {key: outputs[key] for key in ("pred_logits", "pred_boxes")}}
    layers |= {f"_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
    if "enc_outputs" in outputs:
        layers["_enc"] = outputs["enc_outputs"]
    return layers


def gradient_norms(outputs: dict[str, Any]) -> dict[str, float]:
    """After a backward pass: the norm of every leaf's gradient."""
    return {
        f"{key}{suffix}": 0.0 if tensor.grad is None else float(tensor.grad.norm())
        for suffix, layer in layers_of(outputs).items()
        for key, tensor in layer.items()
    }
