"""A prepared model compiled by Inductor trains and answers as in eager mode."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import prepare_compression
from compression_plugins import LearnedScaleConfig, QATConfig

# Inductor takes a while; its own code and Dynamo's use what torch deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_compiled_training(learned, device):
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    eager = toys.mlp(16).to(device)
    compiled = copy.deepcopy(eager)
    data = [torch.randn(8, 6, device=device) for _ in range(4)]
    for model, is_compiled in ((eager, False), (compiled, True)):
        configs = [QATConfig(), *([LearnedScaleConfig()] if learned else [])]
        manager = prepare_compression(model, configs)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        manager.track(optimizer=optimizer)
        torch.compiler.reset()
        called = torch.compile(model) if is_compiled else model
        for _ in manager.epochs(1):
            for _, inputs in manager.steps(data):
                output = called(inputs)
                loss = F.mse_loss(output, torch.ones_like(output))
                loss = manager.on_after_compute_loss(inputs, output, loss)
                loss.backward()
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
        manager.convert(example_inputs=data[0])
    for (name, value), other in zip(
        compiled.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        # Fused arithmetic rounds in other places.
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3, msg=name)
