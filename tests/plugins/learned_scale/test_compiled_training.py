"""Training with learned scales through torch.compile, from the first step on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import prepare_compression
from compression_plugins import LearnedScaleConfig, QATConfig


def _train(model: nn.Module, *, is_compiled: bool) -> dict[str, Tensor]:
    manager = prepare_compression(model, [QATConfig(), LearnedScaleConfig()])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.track(optimizer=optimizer)
    torch.compiler.reset()
    called = torch.compile(model, backend="eager", fullgraph=True) if is_compiled else model
    torch.manual_seed(1)
    for _ in manager.epochs(1):
        for _, input in manager.steps([torch.randn(8, 6) for _ in range(4)]):
            output = called(input)
            loss = manager.on_after_compute_loss(input, output, output.square().mean())
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
    return model.state_dict()


# torch.compile itself instantiates the class while it traces.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
def test_scales_start_without_a_break_in_the_graph():
    torch.manual_seed(0)
    model = toys.mlp()
    again = toys.mlp()
    again.load_state_dict(model.state_dict())
    eager, compiled = _train(model, is_compiled=False), _train(again, is_compiled=True)
    assert all(bool(value) for name, value in compiled.items() if name.endswith("started"))
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        assert torch.equal(value, compiled[name]), name
