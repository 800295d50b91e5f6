"""AP of both sides on COCO-format data: of float32 PyTorch, and of an engine. Needs the train extra."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime

from bundle import Bundle
from parity import Infer
from server.preprocess import lay_on_canvas, preprocess
from training.average_precision import Detection, average_precision
from training.coco import DataError, read_pixels, read_split


class Comparison:
    """A split of data, and what the reference reaches on it.

    Raises DataError, a ValueError, naming the file and what is wrong with it.
    """

    def __init__(self, data: Path, split: str, bundle: Bundle) -> None:
        self._bundle = bundle
        self._split = read_split(data, split)
        if missing := sorted(set(self._split.category_ids) - set(bundle.manifest.categories)):
            raise DataError(f"{self._split.annotations} has categories {missing}, which {bundle.path} does not know")

    def reference(self) -> float:
        """AP of float32: PyTorch's from the bundle's checkpoint, else that of its model.onnx in ONNX Runtime."""
        return self._reference

    @cached_property
    def _reference(self) -> float:
        checkpoint = self._bundle.checkpoint_path
        if checkpoint is not None:
            import torch

            from models import load_checkpoint
            from training.evaluate import evaluate

            return evaluate(load_checkpoint(checkpoint), self._split, torch.device("cpu")).ap
        session = onnxruntime.InferenceSession(self._bundle.onnx_path, providers=["CPUExecutionProvider"])
        outputs = ["boxes", "scores", "labels"]
        return self.average_precision(lambda i, s: session.run(outputs, {"images": i, "sizes": s}))

    def average_precision(self, infer: Infer) -> float:
        """AP of an engine, each picture alone and prepared as the server does."""
        manifest = self._bundle.manifest
        detections: list[Detection] = []
        for picture in self._split.pictures:
            pixels, canvas = preprocess(read_pixels(picture), manifest)
            boxes, scores, labels = (np.asarray(output)[0] for output in infer(*lay_on_canvas([pixels], canvas)))
            scale = np.array([picture.width, picture.height] * 2, np.float32)
            corners = np.clip(boxes * scale, 0, scale)
            corners[:, 2:] -= corners[:, :2]
            found = zip(corners.tolist(), scores.tolist(), labels.tolist(), strict=True)
            for box, score, label in found:
                detections.append({"image_id": picture.image_id, "category_id": label, "bbox": box, "score": score})
        return average_precision(self._split.annotations, detections).ap
