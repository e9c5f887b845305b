"""Small models of every kind that is deployed, trained for a moment and converted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization import (
    QuantizableAdd,
    QuantizableAttention,
    QuantizationScheme,
)
from quantization_reference import trained

VOCABULARY, LENGTH = 30, 8
_EXAMPLES = Path(__file__).parents[1] / "examples" / "models.py"


class Encoder(nn.Module):
    """Tokens (N, L) -> logits (N, 5): an embedding, torch's own encoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits; token 0 is padding."""
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        return self.head(hidden.mean(1))


class Attention(nn.Module):
    """Tokens (N, L) -> logits (N, 5): attention whose query, key and value are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.attention, self.head = QuantizableAttention(), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        hidden = self.embedding(tokens)
        heads = (
            layer(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.head((hidden + self.attention(*heads).transpose(1, 2).flatten(2)).mean(1))


class Recommender(nn.Module):
    """Users (N,) and the items (N, 3) that each has seen -> scores (N, 20), and the user (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(VOCABULARY, 8)
        self.items = nn.Embedding(VOCABULARY, 8)
        self.score = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 20))

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and the embedded users."""
        user = self.users(users)
        return self.score(torch.cat([user, self.items(items).mean(1)], 1)), user


class Block(nn.Module):
    """Two convolutions and a shortcut, whose sum quantizes its residual."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.add = shortcut, QuantizableAdd()

    def forward(self, images: Tensor) -> Tensor:
        """Return images of the same shape."""
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))
        return self.add(hidden, self.shortcut(images)).relu()


def _residual_blocks() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), Block(nn.Identity()), Block(nn.Conv2d(8, 8, 1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def _example(name: str) -> nn.Module:
    specification = importlib.util.spec_from_file_location("example_models", _EXAMPLES)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model: nn.Module = getattr(module, name)()
    return model


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def _images(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, 1, 28, 28, generator=generator)


def _colored_images(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, 3, 17, 17, generator=generator)


def _tokens(batch: int, generator: torch.Generator) -> Tensor:
    tokens = torch.randint(1, VOCABULARY, (batch, LENGTH), generator=generator)
    tokens[::3, 5:] = 0
    return tokens


def _visits(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    users = torch.randint(VOCABULARY, (batch,), generator=generator)
    return users, torch.randint(VOCABULARY, (batch, 3), generator=generator)


def _sentences(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(batch, generator)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


@dataclass(frozen=True)
class Case:
    """How a model is built and quantized, and what it is called with."""

    build: Callable[[], nn.Module]
    make_inputs: Callable[[int, torch.Generator], Any]
    config: dict[str, Any] = field(default_factory=dict)

    def inputs(self, batch: int, seed: int) -> Any:
        """Return what the model is called with."""
        return self.make_inputs(batch, torch.Generator().manual_seed(seed))


CASES = {
    "demo CNN": Case(lambda: _example("student"), _images),
    "ResNet": Case(lambda: _example("teacher"), _images),
    "residual blocks": Case(_residual_blocks, _colored_images),
    "encoder": Case(Encoder, _tokens),
    "attention": Case(Attention, _tokens, {"activation": QuantizationScheme(8)}),
    "embedding": Case(Recommender, _visits),
    "BERT": Case(_bert, _sentences),
}


def converted(case: Case) -> nn.Module:
    """Return the model, trained quantization-aware for three steps, with integer weights."""
    torch.manual_seed(0)
    manager = trained(case.build(), case.inputs(8, seed=0), **case.config)
    model = manager.convert()
    manager.close()
    return model
