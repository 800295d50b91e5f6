"""The precision a network computes in, set in PyTorch before the trace: TensorRT 11 and RTX take it from the graph."""

from torch import Tensor, nn
from torch.nn import functional as F

from models import DeformableDetr
from models.attention import SelfAttention


def to_half(model: DeformableDetr) -> None:
    """Let the network, in place, compute in float16 where that is harmless; what it takes and returns stays float32.

    In float16: convolutions, linear layers, the queries' self-attention, and what they hand on, so the op's values,
    offsets and logits. In float32: norms and softmax inside, positions, reference points, and the heads, whose boxes
    and scores would lose their last digits. The convolutions' weights stay float32 until the graph's constants are
    folded, so that batch norms can still be folded into them.
    """
    in_heads = _head_layers(model)
    for layer in list(model.modules()):
        if id(layer) in in_heads and type(layer) is nn.Linear:
            layer.__class__ = _FloatLinear
    for layer in halved_layers(model):
        layer.__class__ = _HALF[type(layer)]
        if not isinstance(layer, nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            layer.half()


def halved_layers(model: DeformableDetr) -> list[nn.Module]:
    """The layers that `to_half` lets compute in float16."""
    in_heads = _head_layers(model)
    return [layer for layer in model.modules() if id(layer) not in in_heads and type(layer) in _HALF]


def _head_layers(model: DeformableDetr) -> set[int]:
    """Ids of the heads' layers, which stay precise."""
    heads = [model.class_embed, model.bbox_embed, getattr(model.transformer, "reference_points", None)]
    return {id(layer) for head in heads if head is not None for layer in head.modules()}


class _HalfConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.half()
        y: Tensor = self._conv_forward(x.half(), self.weight.half(), bias)
        return y


class _HalfLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.half())


class _FloatLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class _LayerNormToHalf(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).half()


class _GroupNormToHalf(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).half()


class _HalfSelfAttention(SelfAttention):
    """Products in half, and the softmax between them in float32."""

    def forward(self, x: Tensor, position: Tensor, blocked: Tensor | None = None) -> Tensor:
        x, c = x.half(), x.shape[-1]
        query, key = F.linear(x + position.half(), self.in_proj_weight[: 2 * c], self.in_proj_bias[: 2 * c]).chunk(
            2, dim=-1
        )
        value = F.linear(x, self.in_proj_weight[2 * c :], self.in_proj_bias[2 * c :])
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))  # [N, M, Q, D]
        logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).float()  # [N, M, Q, Q]
        if blocked is not None:
            logits = logits.masked_fill(blocked, float("-inf"))
        attended = logits.softmax(dim=-1).half() @ v
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output


_HALF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _HalfConv2d,
    nn.Linear: _HalfLinear,
    nn.LayerNorm: _LayerNormToHalf,
    nn.GroupNorm: _GroupNormToHalf,
    SelfAttention: _HalfSelfAttention,
}
