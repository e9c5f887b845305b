"""What a layer computes with besides its tensors: strides, modes, heads.

Two models whose layers differ in nothing else have the same tensors, so that a file of the one
would load into the other, and answer wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compression_manager.deploy.layers.base import ConvertedLayer

# What makes a difference in inference, and shows in no tensor's shape.
_NAMES = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "output_padding",
    "mode",
    "include_last_offset",
    "bidirectional",
    "batch_first",
    "num_heads",
    "add_zero_attn",
)


def layer_settings(layer: ConvertedLayer) -> dict[str, Any]:
    """Return name -> value of all settings that `layer` has, as JSON gives them back."""
    found = {name: getattr(layer, name) for name in _NAMES if hasattr(layer, name)}
    if layer.spec.kind == "EmbeddingBag":  # nn.Embedding's matters in training alone
        found["padding_idx"] = layer.padding_idx
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
    }


def differing_setting(saved: Mapping[str, Any], layer: ConvertedLayer) -> str | None:
    """Return which setting of `layer` is not as it was saved, in words; None if all are."""
    for name, value in layer_settings(layer).items():
        if name in saved and saved[name] != value:
            return f"{name}={saved[name]!r}; here it has {name}={value!r}"
    return None
