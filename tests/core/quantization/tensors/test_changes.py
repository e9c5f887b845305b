"""Integers are made anew for values that changed without a trace in autograd's counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toys
from quantization_reference import trained

VECTORS = toys.vectors().tensors[0]


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a conversion of the same architecture with other weights."""
    torch.manual_seed(1)
    return trained(toys.mlp(), VECTORS * 3).convert().state_dict()


def load_in_inference_mode(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model.load_state_dict(state)


def write_through_data(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.data.copy_(state[name])


def write_by_numpy(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.numpy()[...] = state[name].numpy()


@pytest.mark.parametrize("write", [load_in_inference_mode, write_through_data, write_by_numpy])
def test_a_deployed_layer_computes_with_weights_that_came_unseen(
    write: Callable[[nn.Module, dict[str, Tensor]], None],
) -> None:
    torch.manual_seed(0)
    served = trained(toys.mlp(), VECTORS, forward="integer").convert()
    with torch.inference_mode():
        before = served(VECTORS)
    state = other_weights(served)
    write(served, state)
    fresh = trained(toys.mlp(), VECTORS, forward="integer").convert()
    fresh.load_state_dict(state)
    with torch.inference_mode():
        assert not torch.equal(served(VECTORS), before)
        assert torch.equal(served(VECTORS), fresh(VECTORS))


class Twice(nn.Module):
    """Two layers read one activation, which is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.embed(input)
        left = self.left(hidden)
        hidden.data.mul_(0.5)
        right: Tensor = self.right(hidden)
        return left + right


def test_activations_that_change_through_data_are_quantized_again() -> None:
    outputs = []
    for forward in ("integer", "fake"):
        torch.manual_seed(0)
        model = Twice()
        trained(model, VECTORS, forward=forward)
        outputs.append(model(VECTORS))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
