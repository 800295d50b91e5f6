"""Batch norms into the convolutions before them: at inference both are one affine map."""

import torch
from torch import Tensor, nn

from models.backbone import FrozenBatchNorm2d


def fold_batch_norms(model: nn.Module) -> None:
    """Fold, in place, every batch norm that directly follows a bias-free convolution; the network must be in eval mode.

    The backbone's modules pair them by name: `conv1` with `bn1`, and (a convolution, a norm) in a Sequential.
    """
    if model.training:
        raise ValueError("a batch norm in training mode has no constant statistics to fold: call eval() first")
    for module in list(model.modules()):
        children = dict(module.named_children())
        names = list(children)
        for name, follower in zip(names, names[1:], strict=False):
            conv, norm = children[name], children[follower]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
                _fold(conv, norm)
                setattr(module, follower, nn.Identity())


def _fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d | nn.BatchNorm2d) -> None:
    """In float64: the product of two float32 numbers is rounded once."""
    mean, variance = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    shift = norm.bias.double() - mean.double() * scale
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    with torch.no_grad():
        conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).float(), requires_grad=False)
        conv.bias = nn.Parameter(shift.float(), requires_grad=False)
