"""Tiny models, each with a shape of its own, that train in a moment."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
"""Number of classes that every tiny model tells apart."""

VOCABULARY = 11
"""Number of different tokens that the tiny transformer reads."""


class ConvolutionNetwork(nn.Module):
    """Two blocks of convolution and BatchNorm, and a classifier.

    Input (N, 1, 8, 8) float; output (N, 4) float logits.

    Args:
        width: channels of both convolutions.
        dropout: probability, before the classifier.
    """

    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width * 16, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits."""
        hidden = F.relu(self.bn1(self.conv1(input)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        logits: Tensor = self.fc(self.dropout(hidden.flatten(1)))
        return logits


class Transformer(nn.Module):
    """An embedding, one encoder layer and a head that labels every token.

    Input (N, L) int64, numbers from 0 to 10; output (N, L, 4) float logits.

    Args:
        width: of the embedding; a multiple of 2, the number of heads.
        dropout: probability, in the encoder layer.
    """

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every token."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return logits


def tiny_classifier(hidden: int = 8, classes: int = CLASSES) -> nn.Sequential:
    """Return two linear layers: input (N, 6) float, output (N, classes) float logits."""
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def tiny_convolution_network(width: int = 4, dropout: float = 0.0) -> ConvolutionNetwork:
    """Return convolutions with BatchNorm: input (N, 1, 8, 8) float, output (N, 4) float logits."""
    return ConvolutionNetwork(width, dropout)


def tiny_transformer(width: int = 8, dropout: float = 0.0) -> Transformer:
    """Return an encoder layer with attention: input (N, L) int64, output (N, L, 4) float logits."""
    return Transformer(width, dropout)
