"""torch's fused inference paths, which would bypass quantized children."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from compression_manager.models.held_attributes import hold

# In eval mode without gradients these modules hand their children's weights to one fused
# kernel and never call the children. Each attribute, set to the value, makes them compute as in
# training (which leaves the outputs of padded positions as they come, not zero).
_SWITCHES: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def disable_fused_paths(model: nn.Module) -> Callable[[], None]:
    """Make every module of `model` call its children; return a function that undoes it."""
    changes = [
        (module, attribute, value)
        for module in model.modules()
        for kind, attribute, value in _SWITCHES
        if isinstance(module, kind)
    ]
    undo = hold((module, attribute) for module, attribute, _ in changes)
    for module, attribute, value in changes:
        setattr(module, attribute, value)
    return undo
