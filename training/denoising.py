"""Contrastive denoising queries (arXiv 2203.03605): noised objects that the decoder learns to restore or reject."""

import torch
from torch import Tensor, nn

from models import DeformableDetrConfig
from models.deformable_detr import ExtraQueries
from training.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from training.criterion import Denoising
from training.matcher import Target


class DenoisingQueries(nn.Module):
    """Makes extra queries from the objects of a batch. Its class embedding is only needed in training.

    Of each object a group holds one query with corners moved by at most half the box's half-sides times `box_noise`
    (to be restored), and one moved further (to be rejected). A share `label_noise` of labels is drawn anew.
    """

    def __init__(
        self, config: DeformableDetrConfig, groups: int, label_noise: float = 0.25, box_noise: float = 1.0
    ) -> None:
        super().__init__()
        if not config.two_stage:
            raise ValueError("denoising needs a two-stage model, whose queries are boxes")
        self.config, self.groups, self.label_noise, self.box_noise = config, groups, label_noise, box_noise
        self.label_embed = nn.Embedding(config.num_classes, config.hidden_dim)

    def forward(self, targets: list[Target]) -> tuple[ExtraQueries, Denoising]:
        """The queries of a batch, [N, 2 * groups * most objects, ...], and their origin.

        A batch without objects has some to reject all the same: each of several processes is to have every gradient.
        """
        most = max(1, *(len(t["labels"]) for t in targets))
        device = self.label_embed.weight.device
        n, per_group = len(targets), 2 * most
        count = per_group * self.groups
        labels = torch.zeros(n, count, dtype=torch.int64, device=device)
        boxes = torch.full((n, count, 4), 0.5, device=device)  # unused places hold a box that is told to be nothing
        pairs = []
        for image, target in enumerate(targets):
            objects = torch.arange(len(target["labels"]), device=device)
            start = torch.arange(self.groups, device=device)[:, None] * per_group
            restore, reject = (start + objects).flatten(), (start + most + objects).flatten()
            for slots, rejected in ((restore, False), (reject, True)):
                labels[image, slots] = self._noised_labels(target["labels"].repeat(self.groups))
                boxes[image, slots] = self._noised_boxes(target["boxes"].float().repeat(self.groups, 1), rejected)
            pairs.append((restore, objects.repeat(self.groups)))
        extra = ExtraQueries(self.label_embed(labels), boxes, self._blocked(count, per_group, device))
        return extra, Denoising(pairs, self.groups)

    def _noised_labels(self, labels: Tensor) -> Tensor:
        drawn = torch.randint_like(labels, self.config.num_classes)
        return torch.where(torch.rand(labels.shape, device=labels.device) < self.label_noise, drawn, labels)

    def _noised_boxes(self, boxes: Tensor, rejected: bool) -> Tensor:
        half = (boxes[:, 2:] / 2).repeat(1, 2)
        sign = torch.randint_like(boxes, 2) * 2 - 1
        amount = (torch.rand_like(boxes) + (1.0 if rejected else 0.0)) * 0.5 * self.box_noise
        corners = (cxcywh_to_xyxy(boxes) + sign * amount * half).clamp(0, 1)
        return xyxy_to_cxcywh(
            torch.cat([torch.minimum(corners[:, :2], corners[:, 2:]), corners.view(-1, 2, 2).amax(1)], -1)
        )

    def _blocked(self, count: int, per_group: int, device: torch.device) -> Tensor:
        """[E+Q, E+Q], True = unseen: the model's queries see no extra ones, and groups do not see each other."""
        total = count + self.config.num_queries
        group = torch.full((total,), -1, device=device)
        group[:count] = torch.arange(count, device=device) // per_group
        seen = group[None, :] == group[:, None]
        seen[:count, count:] = True  # extra queries may look at the model's own
        return ~seen
