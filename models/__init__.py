"""The network of the paper, in the paper's words, and its checkpoints."""

from models.config import VARIANTS, DeformableDetrConfig
from models.deformable_detr import DeformableDetr, build_model

__all__ = ["VARIANTS", "DeformableDetr", "DeformableDetrConfig", "build_model"]
