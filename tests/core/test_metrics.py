"""What is published, and what evaluations may hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toys
from compression_manager import ConfigError, Metric, prepare_compression
from compression_manager.metrics import MetricBoard
from probes import begin_step, call_loss, finish, probe


def test_board_keeps_order_kind_and_step() -> None:
    board = MetricBoard()
    board.scalar("a", 1.0)
    board.global_step = 4
    board.histogram("b", torch.ones(3, requires_grad=True))
    board.image("c", torch.zeros(1, 2, 2))
    metrics = board.drain()
    assert all(isinstance(metric, Metric) for metric in metrics)
    assert [(m.name, m.kind, m.global_step) for m in metrics] == [
        ("a", "scalar", 0),
        ("b", "histogram", 4),
        ("c", "image", 4),
    ]
    assert not metrics[1].value.requires_grad  # type: ignore[union-attr]
    assert board.drain() == []


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalar_tensor_is_copied_as_a_number(shape: tuple[int, ...]) -> None:
    board, value = MetricBoard(), torch.full(shape, 2.0, requires_grad=True)
    board.scalar("a", value)
    with torch.no_grad():
        value.fill_(7)
    assert board.drain()[0].value == 2.0


def test_scalar_of_an_accelerator_is_not_read_when_published() -> None:
    board, value = MetricBoard(), torch.empty(1, 1, device="meta", requires_grad=True)
    board.scalar("a", value)
    published = board.drain()[0].value
    assert isinstance(published, torch.Tensor)
    assert (published.shape, published.requires_grad) == ((), False)


def test_several_numbers_are_no_scalar() -> None:
    def on_step_end(self: Any, context: Any) -> None:
        context.metrics.scalar("mine", torch.ones(2))

    manager = begin_step(
        prepare_compression(toys.mlp(), [probe("culprit", on_step_end=on_step_end)])
    )
    with pytest.raises(ConfigError, match=r"metric 'mine' must be one number.*\(2,\)") as error:
        manager.on_step_end()
    assert "culprit" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        (0.5, "takes a mapping of names to numbers"),
        ({"accuracy": "0.5"}, "metric 'accuracy' is no number: '0.5'"),
        ({"accuracy": b"0.5"}, "metric 'accuracy' is no number: b'0.5'"),
        ({"accuracy": None}, "metric 'accuracy' is no number: None"),
        ({"fine": 1, "pair": torch.ones(2)}, "metric 'pair' is no number"),
    ],
)
def test_unfit_evaluations_change_nothing(metrics: Any, text: str) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.on_before_eval()
    with pytest.raises(ConfigError, match=text):
        manager.on_after_eval(metrics)
    assert manager.evaluations == []
    manager.on_after_eval({"accuracy": 0.5})


def test_evaluations_are_numbers_recorded_and_shown() -> None:
    seen: list[Any] = []

    def on_after_eval(self: Any, metrics: Any) -> None:
        seen.append(dict(metrics))
        metrics["accuracy"] = -1

    def consume_metrics(self: Any, metrics: Any) -> None:
        seen.extend((metric.name, metric.as_float()) for metric in metrics)

    plugin = probe(on_after_eval=on_after_eval, consume_metrics=consume_metrics)
    manager = begin_step(prepare_compression(toys.mlp(), [plugin]))
    manager.on_step_end()
    manager.on_before_eval()
    manager.on_after_eval({"accuracy": torch.tensor([0.5]), "count": 3})
    assert seen == [{"accuracy": 0.5, "count": 3.0}, ("eval/accuracy", 0.5), ("eval/count", 3.0)]
    assert manager.evaluations == [
        {"epoch": 0, "global_step": 0, "metrics": {"accuracy": 0.5, "count": 3.0}}
    ]
    manager.on_step_begin(1)
    finish(manager)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_holds_what_was_published_before(reverse: bool) -> None:
    """A logger that counts its rows can drop those that came after the checkpoint."""

    def count(self: Any, metrics: Any) -> None:
        self.rows = getattr(self, "rows", 0) + len(metrics)

    def save(self: Any, context: Any) -> None:
        self.saved = context.collect_state()["plugins"]["logger"]

    logger = probe("logger", consume_metrics=count, state_dict=lambda self: {"rows": self.rows})
    saver = probe("saver", on_step_end=save)
    plugins = [saver, logger] if reverse else [logger, saver]
    manager = prepare_compression(toys.mlp(), plugins)
    manager.track(optimizer=torch.optim.SGD(manager.model.parameters(), 0.1))
    begin_step(manager)
    call_loss(manager).backward()
    manager.on_before_optimizer_step()
    manager.on_after_optimizer_step()
    with pytest.warns(UserWarning, match="saved after 1 batches"):  # of a plain loop
        finish(manager)
    assert saver.saved["rows"] == logger.rows > 0
