"""From the network's raw outputs to detections: the top K over queries x classes."""

import torch
from torch import Tensor


def top_detections(pred_logits: Tensor, pred_boxes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best `count` pairs of query and class (fewer where there are fewer), as the official code ranks them.

    pred_logits [N, Q, classes], pred_boxes [N, Q, 4] (cx, cy, w, h) -> boxes [N, K, 4] (x0, y0, x1, y1, same unit,
    not clipped), scores [N, K] descending, class indices int64 [N, K].
    """
    classes = pred_logits.shape[-1]
    count = min(count, pred_logits.shape[1] * classes)
    scores, index = pred_logits.flatten(1).sigmoid().topk(count, dim=1)
    query = torch.div(index, classes, rounding_mode="floor")
    cxcywh = pred_boxes.gather(1, query[..., None].expand(-1, -1, 4))
    centre, half = cxcywh[..., :2], cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1), scores, index % classes
