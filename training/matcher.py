"""Which query answers for which object: the cheapest one-to-one assignment of an image."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from training.boxes import cxcywh_to_xyxy, overlaps

Target = dict[str, Tensor]
"""`labels` int64 [n] class indices and `boxes` float [n, 4] (cx, cy, w, h in 0..1) of one image."""


@dataclass(frozen=True)
class MatchCosts:
    """The weights of the three costs, and the focal loss' constants inside the first."""

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


@torch.no_grad()
def match(
    pred_logits: Tensor, pred_boxes: Tensor, targets: list[Target], costs: MatchCosts
) -> list[tuple[Tensor, Tensor]]:
    """Hungarian matching of each image: pairs (queries, objects) of equal length.

    pred_logits [N, Q, classes] before the sigmoid; pred_boxes [N, Q, 4] (cx, cy, w, h in 0..1).

    Source: arXiv 2010.04159, with the focal loss' difference of positive and negative cost as the class cost.
    """
    probability = pred_logits.float().sigmoid()
    negative = (1 - costs.alpha) * probability**costs.gamma * -(1 - probability + 1e-8).log()
    positive = costs.alpha * (1 - probability) ** costs.gamma * -(probability + 1e-8).log()
    label_cost = positive - negative  # [N, Q, classes]
    pairs = []
    for image, target in enumerate(targets):
        boxes, objects = pred_boxes[image].float(), target["boxes"].float()
        _, giou = overlaps(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(objects)[None])  # [Q, n]
        cost = costs.l1 * torch.cdist(boxes, objects, p=1) - costs.giou * giou
        cost = cost + costs.label * label_cost[image][:, target["labels"]]
        if not cost.isfinite().all():
            raise FloatingPointError("the network's outputs are not finite numbers: lower the learning rate")
        queries, matched = linear_sum_assignment(cost.cpu().numpy())
        device = pred_boxes.device
        pairs.append((torch.as_tensor(queries, device=device), torch.as_tensor(matched, device=device)))
    return pairs
