"""`track` takes what can be saved and restored, and refuses the rest as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, LifecycleError, prepare_compression
from parameter_creators import creator
from probes import begin_step, call_loss, probe


class HalfStateful:
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        ({"optimizer": object()}, r"track\(optimizer=...\).*state_dict.*object lacks them"),
        ({"optimizer": [1]}, "list lacks them"),
        ({"scheduler": HalfStateful()}, "HalfStateful lacks them"),
        ({"optimizer": torch.optim.SGD}, "got the class SGD; pass an instance"),
        ({"optimizer": nn.Linear(1, 1)}, r"track\(optimizer=...\) got a module"),
        ({"ema": None}, "NoneType lacks them"),
        ({"dataloader": 3}, r"track\(dataloader=...\) takes an iterable of batches, got int"),
    ],
)
def test_unfit_objects_are_refused_and_nothing_is_registered(
    objects: dict[str, Any], text: str
) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    optimizer = torch.optim.SGD(manager.model.parameters(), 0.1)
    with pytest.raises(ConfigError, match=text):
        manager.track(**{"fine": optimizer, **objects})
    assert len(manager._context.tracked) == 0


def test_the_model_itself_is_refused() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    with pytest.raises(ConfigError, match="got the model itself"):
        manager.track(model=manager.model)
    manager.track(ema=toys.mlp())


def test_track_on_a_closed_manager() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.close()
    with pytest.raises(LifecycleError, match="track was called on a closed manager"):
        manager.track(optimizer=torch.optim.SGD(manager.model.parameters(), 0.1))


def test_later_calls_add_and_replace() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    first, second = (torch.optim.SGD(manager.model.parameters(), rate) for rate in (0.1, 0.2))
    manager.track(optimizer=first)
    manager.track(optimizer=second, ema=first)
    assert dict(manager._context.tracked) == {"optimizer": second, "ema": first}


def test_an_optimizer_that_takes_the_place_of_another_ones_parameters_is_told() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    body, head = (torch.optim.SGD(part.parameters(), 0.1) for part in model)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=body)
    expected = "replaces the SGD .* of which 2 parameters .* another_optimizer=second"
    with pytest.warns(UserWarning, match=expected) as caught:
        manager.track(optimizer=head)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_an_optimizer_may_replace_another_whose_parameters_are_tracked_or_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    body, head = (torch.optim.SGD(part.parameters(), 0.1) for part in model)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=body)
    manager.track(optimizer=body, head=head)
    manager.track(optimizer=head, body=body)
    manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    model[0].requires_grad_(False)
    manager.track(optimizer=torch.optim.SGD(model[1].parameters(), 0.1))


@pytest.mark.filterwarnings("error")
def test_parameters_that_left_the_model_are_not_missed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    model[1] = nn.Linear(2, 3)
    manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.1))


def test_parameters_of_a_tracked_head_are_missed() -> None:
    model, head = nn.Linear(2, 2), nn.Linear(2, 2)
    manager = prepare_compression(model, [creator()])
    both = [*model.parameters(), *head.parameters()]
    manager.track(optimizer=torch.optim.SGD(both, 0.1), head=head)
    with pytest.warns(UserWarning, match="2 parameters"):
        manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.1))


def test_dataloader_reaches_the_plugins() -> None:
    seen: list[Any] = []

    def on_train_begin(self: Any, dataloader: Any) -> None:
        seen.append(dataloader)

    for given, tracked in ((None, None), ([1], None), (None, [2]), ([1], [2])):
        manager = prepare_compression(toys.mlp(), [probe(on_train_begin=on_train_begin)])
        manager.track(dataloader=tracked)
        manager.on_train_begin(given)
    assert seen == [None, [1], [2], [1]]


def test_learning_rates_of_every_group_and_optimizer_are_published() -> None:
    seen: dict[str, float] = {}

    def consume_metrics(self: Any, metrics: Any) -> None:
        seen.update({metric.name: metric.as_float() for metric in metrics})

    def published(**optimizers: Any) -> dict[str, float]:
        seen.clear()
        manager = prepare_compression(model, [probe(consume_metrics=consume_metrics)])
        manager.track(**optimizers)
        begin_step(manager)
        call_loss(manager)
        manager.on_step_end()
        return {name: value for name, value in seen.items() if not name.startswith("loss/")}

    model = toys.mlp()
    one = torch.optim.SGD(model.parameters(), 0.5)
    groups = [{"params": model[0].parameters(), "lr": 0.25}, {"params": model[2].parameters()}]
    two = torch.optim.SGD(groups, 0.125)
    assert published() == {}
    assert published(optimizer=one) == {"learning_rate": 0.5}
    assert published(optimizer=two) == {
        "learning_rate/group_0": 0.25,
        "learning_rate/group_1": 0.125,
    }
    named = {"params": model[0].parameters(), "lr": 0.25, "name": "head"}
    three = torch.optim.SGD([named, {"params": model[2].parameters()}], 0.125)
    assert published(optimizer=three) == {"learning_rate/head": 0.25, "learning_rate": 0.125}
    assert published(optimizer=one, second=two) == {
        "learning_rate/optimizer": 0.5,
        "learning_rate/second/group_0": 0.25,
        "learning_rate/second/group_1": 0.125,
    }


def test_the_learning_rate_is_that_of_the_update_whatever_a_scheduler_does_next() -> None:
    rates: list[float] = []

    def consume_metrics(self: Any, metrics: Any) -> None:
        rates.extend(item.as_float() for item in metrics if item.name == "learning_rate")

    model = toys.mlp()
    manager = prepare_compression(model, [probe(consume_metrics=consume_metrics)])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    manager.track(optimizer=optimizer, scheduler=scheduler)
    inputs = toys.vectors(4).tensors[0]
    for _ in manager.epochs(1):
        for step, batch in manager.steps([inputs] * 6):
            output = model(batch)
            manager.on_after_compute_loss(batch, output, output.square().mean()).backward()
            if step % 3 == 2:
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
                scheduler.step()
    # While the first gradients accumulate, nobody knows yet that updates are announced.
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.1])


def _begin_with(model: nn.Module, **optimizers: torch.optim.Optimizer) -> None:
    manager = prepare_compression(model, [probe()])
    manager.track(**optimizers)
    manager.on_train_begin()


def test_optimizers_of_another_model_are_told() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="built for another model") as caught:
        _begin_with(model, optimizer=torch.optim.SGD(other.parameters(), 0.1))
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_optimizers_beside_that_of_the_model_are_not_told() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    of_other = torch.optim.SGD(other.parameters(), 0.1)
    _begin_with(model, optimizer=of_other, second=torch.optim.SGD([model.bias], 0.1))
    _begin_with(model.requires_grad_(False), optimizer=of_other)
