"""The losses of Deformable DETR, unweighted and under the official code's names."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import DeformableDetrConfig
from training.boxes import cxcywh_to_xyxy, overlaps
from training.matcher import MatchCosts, Target, match

LOSS_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Denoising:
    """What the extra queries were made from: of each image (extra queries, objects); the rest are to be rejected.

    `groups` copies of every object were made, so the losses are divided by that many more objects.
    """

    pairs: Pairs
    groups: int


class Criterion(nn.Module):
    """Match, then focal classification, L1 and generalised IoU, on every decoder layer and on the proposals."""

    def __init__(
        self, config: DeformableDetrConfig, costs: MatchCosts | None = None, quality_targets: bool = False
    ) -> None:
        """`quality_targets`: a matched query is to score its box's IoU (varifocal loss, arXiv 2008.13367), not 1."""
        super().__init__()
        self.config = config
        self.costs = costs or MatchCosts()
        self.quality_targets = quality_targets

    def forward(
        self, outputs: dict[str, Any], targets: list[Target], denoising: Denoising | None = None
    ) -> dict[str, Tensor]:
        """`outputs` of a network in training mode -> its losses, unweighted.

        They are loss_ce, loss_bbox and loss_giou, with suffix _0.. for the auxiliary layers, _enc for the proposals,
        and _dn, _dn_0.. for denoising queries. targets: of each image `labels` int64 [n] and `boxes` [n, 4] (cx, cy,
        w, h in 0..1). Raises ValueError for a label the network does not have.
        """
        self._check(targets)
        count = _object_count(targets, outputs["pred_logits"].device)
        losses = self._layer(outputs, targets, count, "")
        for index, layer in enumerate(outputs.get("aux_outputs", [])):
            losses |= self._layer(layer, targets, count, f"_{index}")
        if "enc_outputs" in outputs:
            binary = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            losses |= self._layer(outputs["enc_outputs"], binary, count, "_enc")  # object or not, in class 0
        if denoising is not None:
            *earlier, last = outputs["extra"]
            for suffix, layer in [("_dn", last), *((f"_dn_{i}", layer) for i, layer in enumerate(earlier))]:
                losses |= self._losses(layer, targets, denoising.pairs, count * denoising.groups, suffix)
        return losses

    def _check(self, targets: list[Target]) -> None:
        for image, target in enumerate(targets):
            labels = target["labels"]
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.config.num_classes:
                raise ValueError(
                    f"labels of image {image} run from {int(labels.min())} to {int(labels.max())}; "
                    f"the network has classes 0 to {self.config.num_classes - 1}"
                )

    def _layer(self, layer: dict[str, Tensor], targets: list[Target], count: Tensor, suffix: str) -> dict[str, Tensor]:
        pairs = match(layer["pred_logits"], layer["pred_boxes"], targets, self.costs)
        return self._losses(layer, targets, pairs, count, suffix)

    def _losses(
        self, layer: dict[str, Tensor], targets: list[Target], pairs: Pairs, count: Tensor, suffix: str
    ) -> dict[str, Tensor]:
        logits, boxes = layer["pred_logits"].float(), layer["pred_boxes"].float()
        image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
        query = torch.cat([queries for queries, _ in pairs])
        labels = torch.cat([t["labels"][objects] for t, (_, objects) in zip(targets, pairs, strict=True)])
        wanted = torch.cat([t["boxes"][objects] for t, (_, objects) in zip(targets, pairs, strict=True)]).to(boxes)

        found = boxes[image, query]  # [matched, 4]
        iou, giou = overlaps(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
        truth = torch.zeros_like(logits)
        truth[image, query, labels] = iou.detach() if self.quality_targets else 1.0
        focal = _varifocal(logits, truth) if self.quality_targets else _focal(logits, truth, self.costs)
        return {
            f"loss_ce{suffix}": focal / count,
            f"loss_bbox{suffix}": F.l1_loss(found, wanted, reduction="sum") / count,
            f"loss_giou{suffix}": (1 - giou).sum() / count,
        }


def build_criterion(config: DeformableDetrConfig) -> Criterion:
    """The paper's criterion for a network of this configuration."""
    return Criterion(config)


def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
    """The number to minimise: each loss by the weight of its name without the suffix."""
    return torch.stack([LOSS_WEIGHTS["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()]).sum()


def _focal(logits: Tensor, truth: Tensor, costs: MatchCosts) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002), summed."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    miss = 1 - (probability * truth + (1 - probability) * (1 - truth))
    balance = costs.alpha * truth + (1 - costs.alpha) * (1 - truth)
    return (balance * miss**costs.gamma * entropy).sum()


def _varifocal(logits: Tensor, truth: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Varifocal loss (arXiv 2008.13367), summed: positives weigh their IoU, negatives are focal."""
    weight = torch.where(truth > 0, truth, alpha * logits.detach().sigmoid() ** gamma)
    return (weight * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")).sum()


def _object_count(targets: list[Target], device: torch.device) -> Tensor:
    """Objects per process, averaged over all processes, at least 1."""
    count = torch.tensor(float(sum(len(t["labels"]) for t in targets)), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1.0)
