import io
import re
from types import SimpleNamespace

import pytest
import torch
import tqdm
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from compression_manager.context import Context
from compression_manager.errors import ConfigError
from compression_plugins.progress import ProgressConfig, ProgressPlugin

# pytest puts its own sys.stderr back between fixtures and tests.
STREAMS = "compression_plugins.progress.plugin.sys"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Costly:
    """Stands for a tensor on a device: counts how often the host waits for it."""

    reads = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        Costly.reads += 1
        return self.value


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(STREAMS, SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(STREAMS, SimpleNamespace(stderr=stream))
    return stream


class Loop:
    """Calls the plugin's hooks as the manager does."""

    def __init__(self, loader: object = None, **options: object) -> None:
        self.plugin = ProgressPlugin(ProgressConfig(**options))  # type: ignore[arg-type]
        self.context = Context(nn.Linear(2, 2), recipe={})
        self.plugin.on_train_begin(context=self.context, dataloader=loader)

    def epoch(self, number: int) -> None:
        self.context.epoch = number
        self.plugin.on_epoch_begin(epoch=number)

    def step(self, number: int, loss: object = 0.5) -> None:
        self.context.step = number
        self.plugin.on_step_begin(step=number)
        self.context.metrics.scalar("loss/total", loss)  # type: ignore[arg-type]
        self.context.metrics.scalar("learning_rate", 0.1)
        self.context.metrics.histogram("loss/histogram", torch.zeros(3))
        self.plugin.on_step_end()
        self.deliver()

    def evaluate(self, accuracy: float) -> None:
        self.plugin.on_before_eval()
        self.context.metrics.scalar("eval/accuracy", accuracy)
        self.deliver()

    def deliver(self) -> None:
        self.plugin.consume_metrics(metrics=self.context.metrics.drain())

    def end_epoch(self) -> None:
        self.plugin.on_epoch_end(context=self.context)


def last_bar(terminal: Terminal) -> str:
    return re.split(r"[\r\n]+", terminal.getvalue().strip())[-1]


def test_without_a_terminal_each_epoch_is_one_line(log) -> None:
    loop = Loop([1, 2])
    for number in (3, 4):
        loop.epoch(number)
        loop.step(0, torch.tensor(0.75))
        loop.step(1, torch.tensor(0.412))
        loop.evaluate(0.87)
        loop.end_epoch()
    assert log.getvalue() == (
        "epoch 3: loss/total 0.412, eval/accuracy 0.87\n"
        "epoch 4: loss/total 0.412, eval/accuracy 0.87\n"
    )


def test_the_description_stands_before_the_epoch(log) -> None:
    loop = Loop(description="student")
    loop.epoch(0)
    loop.step(0)
    loop.end_epoch()
    assert log.getvalue() == "student, epoch 0: loss/total 0.5\n"


def test_a_terminal_gets_a_bar_with_total_losses_and_evaluation(terminal) -> None:
    loop = Loop([1, 2, 3])
    loop.epoch(0)
    for number, loss in enumerate((3.0, 2.0, 1.0)):
        loop.step(number, loss)
    loop.evaluate(0.87)
    loop.end_epoch()
    bar = last_bar(terminal)
    assert bar.startswith("epoch 0: 100%")
    assert "3/3" in bar
    assert "loss/total 1, eval/accuracy 0.87" in bar
    assert "learning_rate" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_every_loss_term_is_shown_in_the_order_of_its_publication(terminal) -> None:
    loop = Loop([1])
    loop.epoch(0)
    loop.plugin.on_step_begin(step=0)
    for name, value in (("task", 0.5), ("kd/KL", 2.0), ("total", 2.5)):
        loop.context.metrics.scalar(f"loss/{name}", value)
    loop.deliver()
    loop.end_epoch()
    assert "loss/task 0.5, loss/kd/KL 2, loss/total 2.5" in last_bar(terminal)


def test_the_bar_shows_completed_steps_while_it_runs(terminal) -> None:
    loop = Loop([1, 2, 3], refresh_seconds=0)
    loop.epoch(0)
    loop.step(0, 3.0)
    loop.step(1, 2.0)
    assert "1/3" in last_bar(terminal)
    assert "loss/total 3" in last_bar(terminal)
    loop.plugin.on_before_eval()
    assert "2/3" in last_bar(terminal)
    assert "loss/total 2" in last_bar(terminal)
    loop.end_epoch()


def test_a_resumed_epoch_counts_the_skipped_steps(terminal) -> None:
    loop = Loop([1, 2, 3], refresh_seconds=0)
    loop.epoch(0)
    loop.step(1)
    loop.step(2)
    loop.end_epoch()
    assert "3/3" in last_bar(terminal)


def test_the_device_is_read_only_when_the_bar_is_drawn(terminal, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(Costly, "reads", 0)
    loop = Loop([1] * 10, refresh_seconds=1.0)
    loop.epoch(0)
    for number in range(5):
        loop.step(number, Costly(1.0))
    assert Costly.reads == 0
    now = 101.5
    loop.step(5, Costly(1.0))
    loop.step(6, Costly(1.0))
    assert Costly.reads == 1
    loop.end_epoch()
    assert Costly.reads == 2


def test_without_a_terminal_the_device_is_read_once_an_epoch(log, monkeypatch) -> None:
    monkeypatch.setattr(Costly, "reads", 0)
    loop = Loop(refresh_seconds=0)
    loop.epoch(0)
    for number in range(5):
        loop.step(number, Costly(1.0))
    loop.end_epoch()
    assert Costly.reads == 1


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize("loader", [None, iter([1]), DataLoader(Endless())])
def test_a_loader_without_a_length_gets_a_bar_without_a_total(terminal, loader) -> None:
    loop = Loop(loader)
    loop.epoch(0)
    loop.step(0)
    loop.end_epoch()
    assert "1step" in last_bar(terminal)


def test_the_tracked_loader_gives_the_total(terminal) -> None:
    loop = Loop()
    loop.context.tracked.register({"dataloader": [1, 2, 3, 4]})
    loop.plugin.on_train_begin(context=loop.context, dataloader=None)
    loop.epoch(0)
    loop.step(0)
    loop.end_epoch()
    assert "1/4" in last_bar(terminal)


@pytest.mark.parametrize("how", ["exception", "close", "next epoch"])
def test_an_open_bar_is_closed(terminal, how) -> None:
    loop = Loop([1, 2])
    loop.epoch(0)
    loop.step(0)
    assert not terminal.getvalue().endswith("\n")
    if how == "exception":
        loop.plugin.on_exception()
    elif how == "close":
        assert loop.context.run_cleanup() == []
    else:
        loop.epoch(1)
        assert "\n" in terminal.getvalue()
        loop.plugin.on_exception()
    assert terminal.getvalue().endswith("\n")
    before = terminal.getvalue()
    assert loop.context.run_cleanup() == []
    assert terminal.getvalue() == before


def test_evaluation_outside_of_an_epoch_is_harmless(terminal) -> None:
    loop = Loop([1])
    loop.evaluate(0.5)
    assert terminal.getvalue() == ""


def test_tqdm_starts_no_thread_for_the_bar(terminal, monkeypatch) -> None:
    # Another test's bar may have started the thread that tqdm shares.
    monkeypatch.setattr(tqdm.tqdm, "monitor", None)
    loop = Loop([1])
    loop.epoch(0)
    assert loop.plugin._bar is not None
    assert type(loop.plugin._bar).monitor is None
    loop.end_epoch()


@pytest.mark.parametrize(
    "options", [{"refresh_seconds": -1}, {"refresh_seconds": "fast"}, {"description": 3}]
)
def test_bad_options_are_refused(options) -> None:
    with pytest.raises(ConfigError, match=f"ProgressConfig.{next(iter(options))} must be"):
        ProgressConfig(**options)
