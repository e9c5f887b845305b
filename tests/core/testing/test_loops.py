"""The kit's loops, models and data fit together, and place every hook."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compression_manager import LifecycleError, prepare_compression
from compression_manager.hookspecs import OPTIONAL_HOOKS
from compression_manager.testing import (
    RecordingPlugin,
    images,
    loader,
    tiny_classifier,
    tiny_convolution_network,
    tiny_transformer,
    tokens,
    train,
    train_with_hooks,
    train_without_optional_hooks,
    vectors,
)
from compression_manager.testing.recording import HOOKS
from compression_plugins import CheckpointConfig, QATConfig

PAIRS: list[tuple[Callable[[], nn.Module], Callable[..., Any]]] = [
    (tiny_classifier, vectors),
    (tiny_convolution_network, images),
    (tiny_transformer, tokens),
]


@pytest.mark.parametrize(("make_model", "make_data"), PAIRS)
def test_models_learn_their_data_and_convert(
    make_model: Callable[[], nn.Module], make_data: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    with prepare_compression(model, [QATConfig()]) as manager:
        manager.track(optimizer=optimizer)
        losses = train(manager, loader(make_data(16)), optimizer, 12)
        data = make_data(4, seed=1).tensors
        assert manager.convert()(data[0]).shape == (*data[1].shape, 4)
    assert len(losses) == 24
    assert losses[-1] < 0.85 * losses[0]


def test_models_take_different_inputs() -> None:
    shapes = {
        (make_data(2).tensors[0].shape, make_data(2).tensors[0].dtype) for _, make_data in PAIRS
    }
    assert len(shapes) == len(PAIRS)


def test_data_follow_the_seed() -> None:
    for _, make_data in PAIRS:
        first, again, other = make_data(4), make_data(4), make_data(4, seed=1)
        for index in (0, 1):
            assert torch.equal(first.tensors[index], again.tensors[index])
        assert not torch.equal(first.tensors[0], other.tensors[0])


def _recorded(loop: Callable[..., list[float]], *arguments: Any) -> tuple[list[str], list[float]]:
    torch.manual_seed(0)
    model = tiny_classifier()
    recording = RecordingPlugin()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager = prepare_compression(model, [recording])
    losses = loop(manager, loader(vectors(24)), optimizer, *arguments)
    return recording.hooks, losses


def test_both_loops_train_alike() -> None:
    hooks, losses = _recorded(train, 2)
    other_hooks, other_losses = _recorded(train_with_hooks, 2)
    assert other_losses == losses
    assert other_hooks == hooks
    services = {name for name in HOOKS if name.startswith("make_")}
    unplaced = {"on_exception", "convert_model", "publish_details"}
    assert set(hooks) == set(HOOKS) - services - unplaced


def test_the_bare_loop_has_two_losses_and_no_optional_hook() -> None:
    hooks, losses = _recorded(train_without_optional_hooks)
    assert len(losses) == 6
    assert not OPTIONAL_HOOKS & set(hooks)
    assert hooks.count("on_after_compute_loss") == 2 * hooks.count("on_before_optimizer_step") == 6


def test_a_plugin_that_requires_an_optional_hook_is_not_served(tmp_path: Any) -> None:
    model = tiny_classifier()
    manager = prepare_compression(model, [CheckpointConfig(tmp_path, metric="loss")])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(LifecycleError):
        train_without_optional_hooks(manager, loader(vectors(8)), optimizer)


@pytest.mark.parametrize("loop", [train, train_with_hooks])
def test_what_the_loop_passes_with_the_loss(loop: Callable[..., list[float]]) -> None:
    recording, model = RecordingPlugin(), tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager = prepare_compression(model, [recording])
    data = vectors(8)
    batches = loader(data, shuffle=False)
    loop(manager, batches, optimizer, 1, loss_arguments=lambda batch: {"target": batch[1]})
    [given] = recording.arguments("on_after_compute_loss")
    assert torch.equal(given["target"], data.tensors[1])


def test_callbacks_see_each_step_and_epoch() -> None:
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = loader(vectors(16))
    seen: list[Any] = []
    manager = prepare_compression(copy.deepcopy(model), [RecordingPlugin()])
    train(manager, batches, optimizer, 2, after_step=lambda e, s, loss: seen.append((e, s)))
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
    del seen[:]
    manager = prepare_compression(model, [RecordingPlugin()])
    train_with_hooks(manager, batches, optimizer, 2, after_epoch=seen.append)
    assert seen == [0, 1]
