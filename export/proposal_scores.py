"""The two-stage model's proposals are ranked by one class: a served graph computes no other."""

from torch import nn

from models import DeformableDetr


def score_one_class(model: DeformableDetr) -> None:
    """Cut the head that ranks the proposals, in place, down to its first row; nothing without a first stage.

    That head is asked for every pixel of the memory, and only training looks at its other classes.
    """
    if not model.config.two_stage:
        return
    head = model.class_embed[-1]
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(head.weight.detach()[:1], requires_grad=False)
    head.bias = nn.Parameter(head.bias.detach()[:1], requires_grad=False)
