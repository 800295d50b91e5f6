"""The network of the paper, in the paper's words, and its checkpoints."""

from models.checkpoint import load_checkpoint, save_checkpoint
from models.config import VARIANTS, DeformableDetrConfig
from models.deformable_detr import DeformableDetr, build_model
from models.weights import CheckpointError

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "DeformableDetr",
    "DeformableDetrConfig",
    "build_model",
    "load_checkpoint",
    "save_checkpoint",
]
