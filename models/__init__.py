"""The network of the paper, in the paper's words, and its checkpoints."""

from models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from models.config import VARIANTS, DeformableDetrConfig
from models.deformable_detr import DeformableDetr, build_model

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "DeformableDetr",
    "DeformableDetrConfig",
    "build_model",
    "load_checkpoint",
    "save_checkpoint",
]
