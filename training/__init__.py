"""Matching, losses, data, training and evaluation of Deformable DETR."""

from training.criterion import Criterion, build_criterion

__all__ = ["Criterion", "build_criterion"]
