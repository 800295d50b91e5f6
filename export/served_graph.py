"""What a server runs, as one module: pixels and sizes in, detections out; nothing is left for the host to compute."""

import torch
from torch import Tensor, nn

from models import DeformableDetr
from models.postprocess import top_detections

MAX_DETECTIONS = 100


class ServedGraph(nn.Module):
    """The network between its pre- and post-processing.

    It also returns the network's own outputs, on which parity is measured: a top K orders near-ties by their last bit.
    """

    def __init__(self, model: DeformableDetr, max_detections: int = MAX_DETECTIONS) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.max_detections = min(max_detections, config.num_queries * config.num_classes)
        mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))
        self.register_buffer("category_ids", torch.tensor(config.category_ids, dtype=torch.int64))
        self.scale: Tensor
        self.shift: Tensor
        self.category_ids: Tensor

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Detect in a batch of one canvas.

        images uint8 [N, H, W, 3] RGB, each in the top-left corner; sizes int64 [N, 2] (h, w) of the part it fills.
        Returns boxes [N, K, 4] (x0, y0, x1, y1 in 0..1 of the image, not clipped), scores [N, K] descending, labels
        int64 [N, K] category ids; and the raw pred_logits [N, Q, classes] and pred_boxes [N, Q, 4].
        """
        _, height, width, _ = images.shape
        rows = torch.arange(height, device=images.device)[None] < sizes[:, :1]  # [N, H]
        columns = torch.arange(width, device=images.device)[None] < sizes[:, 1:]  # [N, W]
        mask = rows[:, :, None] & columns[:, None, :]  # [N, H, W]
        pixels = images.permute(0, 3, 1, 2).float()  # transposed while a pixel is a byte: a quarter of the traffic
        # Padding is zero after the normalisation, as in the official pipeline.
        pixels = (pixels * self.scale + self.shift) * mask[:, None].float()  # [N, 3, H, W]
        outputs = self.model(pixels, mask)
        logits, raw_boxes = outputs["pred_logits"], outputs["pred_boxes"]
        boxes, scores, labels = top_detections(logits, raw_boxes, self.max_detections)
        if self.category_ids.numel():
            labels = self.category_ids[labels]
        return boxes, scores, labels, logits, raw_boxes
