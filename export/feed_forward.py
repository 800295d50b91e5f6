"""The encoder's feed-forward networks as two pointwise convolutions."""

from torch import Tensor, nn

from models import DeformableDetr


def feed_forward_as_convolutions(model: DeformableDetr) -> None:
    """Turn, in place, the two linear layers of every encoder layer into 1x1 convolutions over the pixels.

    ONNX Runtime adds the bias and applies the ReLU inside its convolution, before the result leaves the cache; beside a
    matrix product each is a pass over the network's largest tensor, [N, S, ffn_dim].
    """
    for layer in model.transformer.encoder.layers:
        first, second = layer.linear1, layer.linear2
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        layer.linear1, layer.linear2 = _ToMap(first), _FromMap(second)


def _convolution(linear: nn.Linear) -> nn.Conv2d:
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
    conv.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return conv


class _ToMap(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.conv = _convolution(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, C] -> [N, F, S, 1]."""
        output: Tensor = self.conv(x[:, :, None].permute(0, 3, 1, 2))
        return output


class _FromMap(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.conv = _convolution(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[N, F, S, 1] -> [N, S, C]."""
        output: Tensor = self.conv(x).permute(0, 2, 3, 1).squeeze(2)
        return output
