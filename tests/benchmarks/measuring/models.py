"""The two networks that every speed benchmark takes: a transformer encoder and a ResNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization import QuantizableAdd, QuantizableAttention

CLASSES = 10


class EncoderLayer(nn.Module):
    """A pre-norm layer with separate projections: (N, L, width) float -> the same."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.attention: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.feedforward_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, feedforward)
        self.activation = nn.GELU()
        self.narrow = nn.Linear(feedforward, width)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.attention_norm(input)
        query, key, value = (
            layer(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = self.attention(query, key, value)
        input = input + self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.wide(self.feedforward_norm(input))
        return input + self.narrow(self.activation(hidden))


def let_attention_be_quantized(model: nn.Module) -> None:
    """Put a module in the place of each call of attention."""
    for module in model.modules():
        if isinstance(module, EncoderLayer):
            module.attention = QuantizableAttention()


class Encoder(nn.Module):
    """(N, L, width) float embeddings -> (N, 10) logits of the mean over the positions."""

    def __init__(self, layers: int, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(EncoderLayer(width, heads, feedforward) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(input)).mean(1))


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.add = QuantizableAdd()
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(input)))))
        return self.relu2(self.add(hidden, self.shortcut(input)))


class ResNet(nn.Module):
    """(N, 3, H, W) float -> (N, 10) logits; three stages of two blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = nn.Sequential(
            Block(width, width, 1),
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            Block(2 * width, 2 * width, 1),
            Block(2 * width, 4 * width, 2),
            Block(4 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.stages(self.relu(self.bn1(self.conv1(input))))
        return self.head(hidden.mean((2, 3)))


@dataclass(frozen=True)
class Workload:
    """A network and the batches that it is trained on or asked about.

    Attributes:
        description: the sizes, in words.
        build: makes the network, in the memory format of the inputs, with the same weights each
            time.
        batches: (inputs, targets, sample ids) of each batch.
    """

    name: str
    description: str
    build: Callable[[], nn.Module]
    batches: list[tuple[Tensor, Tensor, Tensor]]
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def inputs(self) -> Tensor:
        """The inputs of the first batch."""
        return self.batches[0][0]


def encoder(shrink: int = 1, batches: int = 4) -> Workload:
    """Return the encoder: 4 layers, width 512, 8 heads, 2048 wide inside, batches of 16x128.

    Args:
        shrink: divides every size, for tests.
        batches: how many different batches there are.
    """
    layers, width, heads, feedforward = max(1, 4 // shrink), 512 // shrink, 8, 2048 // shrink
    samples, length = 16 // min(shrink, 4), 128 // shrink

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Encoder(layers, width, heads, feedforward)

    return Workload(
        "encoder",
        f"{layers} layers, width {width}, {heads} heads, feed-forward {feedforward}, "
        f"batches of {samples}x{length} embeddings",
        build,
        _batches((samples, length, width), batches, torch.contiguous_format),
    )


def small_encoder(shrink: int = 1, batches: int = 4) -> Workload:
    """Return an encoder of 2 layers, width 256, in batches of 4x32: 128 rows, few for a kernel."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Encoder(2, 256 // shrink, 4, 1024 // shrink)

    return Workload(
        "small-encoder",
        f"2 layers, width {256 // shrink}, 4 heads, feed-forward {1024 // shrink}, "
        "batches of 4x32 embeddings",
        build,
        _batches((4, 32, 256 // shrink), batches, torch.contiguous_format),
    )


def resnet(shrink: int = 1, batches: int = 4) -> Workload:
    """Return the ResNet: width 64 to 256, batches of 32 images of 32x32, channels_last."""
    width, samples, size = 64 // shrink, 32 // min(shrink, 8), 32 // min(shrink, 4)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return ResNet(width).to(memory_format=torch.channels_last)

    return Workload(
        "resnet",
        f"3 stages of 2 blocks, width {width} to {4 * width}, "
        f"batches of {samples} images {size}x{size}, channels_last",
        build,
        _batches((samples, 3, size, size), batches, torch.channels_last),
        torch.channels_last,
    )


def _batches(
    shape: tuple[int, ...], count: int, memory_format: torch.memory_format
) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    samples = shape[0]
    return [
        (
            torch.randn(shape, generator=generator).contiguous(memory_format=memory_format),
            torch.randint(CLASSES, (samples,), generator=generator),
            torch.arange(number * samples, (number + 1) * samples),
        )
        for number in range(count)
    ]


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "encoder": encoder,
    "resnet": resnet,
    "small-encoder": small_encoder,
}
