"""The residual backbone, with torchvision's key names: stem, four stages, and the feature maps C2 to C5."""

import torch
from torch import Tensor, nn

from models.config import DeformableDetrConfig


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: buffers, never trained, never updated."""

    eps = 1e-5

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(cin, cout, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int, dilation: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = _conv(cin, width, 3, stride, dilation)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, 1, dilation)
        self.bn2 = norm(width)
        self.downsample = _shortcut(cin, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, width, H/stride, W/stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (where the stride is), 1x1 and a shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int, dilation: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = _conv(cin, width, 1)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, stride, dilation)
        self.bn2 = norm(width)
        self.conv3 = _conv(width, width * 4, 1)
        self.bn3 = norm(width * 4)
        self.downsample = _shortcut(cin, width * 4, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[N, cin, H, W] -> [N, 4*width, H/stride, W/stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(y + shortcut)


def _shortcut(cin: int, cout: int, stride: int, norm: type[nn.Module]) -> nn.Sequential | None:
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(_conv(cin, cout, 1, stride), norm(cout))


class ResNet(nn.Module):
    """Stem and four stages of strides 4, 8, 16, 32 (16 in the last with dilation, the paper's DC5)."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        block = Bottleneck if config.backbone_block == "bottleneck" else BasicBlock
        norm = FrozenBatchNorm2d if config.backbone_norm == "frozen" else nn.BatchNorm2d
        stem = config.backbone_widths[0]
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        cin = stem
        self.num_channels: list[int] = []  # of C2, C3, C4, C5
        for index, (depth, width) in enumerate(zip(config.backbone_depths, config.backbone_widths, strict=True)):
            stride = 1 if index == 0 else 2
            first_dilation = dilation = 1
            if index == 3 and config.dilation:
                stride, dilation = 1, 2  # the stride becomes dilation, from the second block on
            blocks = []
            for position in range(depth):
                first = position == 0
                blocks.append(block(cin, width, stride if first else 1, first_dilation if first else dilation, norm))
                cin = width * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self.num_channels.append(cin)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> C2, C3, C4, C5, each [N, num_channels[i], H/stride, W/stride]."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(pixel_values))))
        maps = []
        for index in range(4):
            x = getattr(self, f"layer{index + 1}")(x)
            maps.append(x)
        return maps
