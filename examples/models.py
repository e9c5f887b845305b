"""The demo's two networks: plain torch modules that know nothing of compression."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, "Deep Residual Learning").

    input: (N, in_channels, H, W) float -> (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, input: Tensor) -> Tensor:
        """Return `relu(convolutions(input) + shortcut(input))`."""
        hidden = self.relu(self.bn1(self.conv1(input)))
        output: Tensor = self.relu(self.bn2(self.conv2(hidden)) + self.shortcut(input))
        return output


def teacher() -> nn.Sequential:
    """Return a ResNet of three blocks: (N, 1, 28, 28) float -> (N, 10) logits."""
    widths = (16, 48, 160)
    layers = [("stem", _conv_bn_relu(1, widths[0], stride=2))]
    previous = widths[0]
    for index, width in enumerate(widths, start=1):
        block = ResidualBlock(previous, width, stride=1 if index == 1 else 2)
        layers.append((f"block{index}", block))
        previous = width
    return _with_head(layers, previous)


def student() -> nn.Sequential:
    """Return a CNN of three convolutions: (N, 1, 28, 28) float -> (N, 10) logits."""
    layers = []
    previous = 1
    for index, width in enumerate((18, 36, 72), start=1):
        layers.append((f"block{index}", _conv_bn_relu(previous, width, stride=2)))
        previous = width
    return _with_head(layers, previous)


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            bn=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(),
        )
    )


def _with_head(layers: list[tuple[str, nn.Module]], features: int) -> nn.Sequential:
    head = [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Linear(features, 10)),
    ]
    return nn.Sequential(OrderedDict([*layers, *head]))
