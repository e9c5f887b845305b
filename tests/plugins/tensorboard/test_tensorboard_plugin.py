import itertools
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.context import Context
from compression_manager.errors import ConfigError
from compression_plugins import PTQConfig
from compression_plugins.tensorboard import TensorBoardConfig, TensorBoardPlugin
from probes import run_step

RECIPE = {
    "seed": 3,
    "plugins": {
        "qat": {"plugin": "qat", "bits": 8, "skip": ["head"], "name": None, "extra": {}},
        "distillation": {"criterion": {"temperature": 4.0, "soft": True}},
    },
}


@pytest.fixture(autouse=True)
def one_second_per_event_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads a folder's files by name: the second of their creation comes first."""
    seconds = itertools.count(1_800_000_000)
    module = "tensorboard.summary.writer.event_file_writer.time"
    monkeypatch.setattr(module, SimpleNamespace(time=lambda: next(seconds)))


class Loop:
    """Calls the plugin's hooks as the manager does."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.plugin = TensorBoardPlugin(TensorBoardConfig(directory=directory, **options))
        self.context = Context(nn.Linear(2, 2), recipe=RECIPE)

    def begin(self, global_step: int = 0) -> None:
        self.context.global_step = global_step
        self.plugin.on_train_begin(context=self.context)

    def step(self, losses: list[float], details: dict[str, torch.Tensor] | None = None) -> None:
        """Run the micro-batches of one update."""
        for index, loss in enumerate(losses):
            self.plugin.on_step_begin(context=self.context)
            self.context.metrics.scalar("loss/total", torch.tensor(loss, requires_grad=True))
            if index == len(losses) - 1:
                self.plugin.on_before_optimizer_step(context=self.context)
                self.context.global_step += 1
            self.context.metrics.scalar("learning_rate", 0.5)
            for name, value in (details or {}).items():
                self.context.metrics.histogram(name, value)
            self.deliver()

    def evaluate(self, accuracy: float) -> None:
        self.plugin.on_before_eval()
        self.context.metrics.scalar("eval/accuracy", accuracy)
        self.deliver()

    def deliver(self) -> None:
        self.plugin.consume_metrics(context=self.context, metrics=self.context.metrics.drain())

    def close(self) -> None:
        assert self.context.run_cleanup() == []


def read(directory: Path) -> EventAccumulator:
    # 0: keep everything
    events = EventAccumulator(str(directory), {"scalars": 0, "histograms": 0, "images": 0})
    return events.Reload()


def points(directory: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(directory).Scalars(name)]


def hyperparameters(directory: Path) -> tuple[dict[str, Any], list[str]]:
    content = read(directory).summary_metadata
    start = HParamsPluginData.FromString(
        content["_hparams_/session_start_info"].plugin_data.content
    )
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"].plugin_data.content)
    values = {}
    for name, value in start.session_start_info.hparams.items():
        values[name] = getattr(value, str(value.WhichOneof("kind")))
    return values, [info.name.tag for info in experiment.experiment.metric_infos]


def test_scalars_stand_at_the_number_of_completed_updates(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    loop.step([3.0])
    loop.step([2.0])
    loop.evaluate(0.75)
    loop.close()
    assert points(tmp_path, "loss/total") == [(1, 3.0), (2, 2.0)]
    assert points(tmp_path, "learning_rate") == [(1, 0.5), (2, 0.5)]
    assert points(tmp_path, "eval/accuracy") == [(2, 0.75)]


def test_accumulated_losses_become_one_point_with_their_mean(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    loop.step([3.0, 1.0])
    loop.step([2.0, 4.0])
    loop.close()
    assert points(tmp_path, "loss/total") == [(1, 2.0), (2, 3.0)]


def test_evaluation_is_written_while_gradients_accumulate(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    loop.plugin.on_step_begin(context=loop.context)
    loop.evaluate(0.5)
    loop.close()
    assert points(tmp_path, "eval/accuracy") == [(0, 0.5)]


def test_scalars_at_an_interval_but_evaluations_always(tmp_path: Path) -> None:
    loop = Loop(tmp_path, scalar_every_steps=2)
    loop.begin()
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        loop.step([loss])
    loop.evaluate(0.5)
    loop.close()
    assert points(tmp_path, "loss/total") == [(2, 2.0), (4, 4.0)]
    assert points(tmp_path, "eval/accuracy") == [(5, 0.5)]


@pytest.mark.parametrize(("interval", "requested"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (None, [])])
def test_details_are_requested_at_their_interval(tmp_path, interval, requested) -> None:
    loop = Loop(tmp_path, detail_every_steps=interval)
    loop.begin()
    seen = []
    for number in range(4):
        loop.context.details_requested = False
        loop.step([1.0])
        if loop.context.details_requested:
            seen.append(number)
    loop.close()
    assert seen == requested


def test_histograms_and_images(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    weight = torch.tensor([[-1.0, 2.0], [float("nan"), float("inf")]], dtype=torch.bfloat16)
    nothing = {"empty": torch.zeros(0), "lost": torch.full((3,), float("nan"))}
    loop.step([1.0], {"weight": weight, "codes": torch.arange(4), **nothing})
    image = torch.zeros(3, 4, 5)
    loop.context.metrics.image("picture", image)
    loop.deliver()
    loop.close()
    events = read(tmp_path)
    assert sorted(events.Tags()["histograms"]) == ["codes", "weight"]
    (histogram,) = events.Histograms("weight")
    assert histogram.step == 1
    value = histogram.histogram_value
    assert (value.num, value.min, value.max) == (2, -1.0, 2.0)
    (picture,) = events.Images("picture")
    assert (picture.width, picture.height) == (5, 4)


def test_the_recipe_becomes_hyperparameters_of_the_last_evaluation(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    loop.step([1.0])
    loop.evaluate(0.5)
    loop.evaluate(0.75)
    loop.plugin.on_train_end(context=loop.context)
    values, metrics = hyperparameters(tmp_path)  # before closing: on_train_end flushes
    loop.close()
    assert values == {
        "seed": 3,
        "plugins.qat.plugin": "qat",
        "plugins.qat.bits": 8,
        "plugins.qat.skip": '["head"]',
        "plugins.qat.name": "null",
        "plugins.qat.extra": "{}",
        "plugins.distillation.criterion.temperature": 4.0,
        "plugins.distillation.criterion.soft": True,
    }
    assert metrics == ["eval/accuracy"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_resumed_run_continues_its_curves_without_duplicates(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.begin()
    first.step([10.0])
    first.step([9.0])
    first.evaluate(0.2)  # a checkpoint is saved here, at step 2
    first.step([8.0])
    first.step([7.0])
    first.evaluate(0.4)
    first.close()  # and the process dies here
    second = Loop(tmp_path)
    second.begin(global_step=2)
    second.step([5.0])
    second.evaluate(0.3)
    second.close()
    assert points(tmp_path, "loss/total") == [(1, 10.0), (2, 9.0), (3, 5.0)]
    assert [value for _, value in points(tmp_path, "eval/accuracy")] == pytest.approx([0.2, 0.3])
    assert [step for step, _ in points(tmp_path, "learning_rate")] == [1, 2, 3]


def test_a_run_that_starts_over_supersedes_the_earlier_one(tmp_path: Path) -> None:
    for losses in ([3.0, 2.0, 1.0], [30.0]):
        loop = Loop(tmp_path)
        loop.begin()
        for loss in losses:
            loop.step([loss])
        loop.close()
    assert points(tmp_path, "loss/total") == [(1, 30.0)]


def test_resuming_a_finished_run_keeps_its_hyperparameters(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.begin()
    first.step([1.0])
    first.evaluate(0.5)
    first.plugin.on_train_end(context=first.context)
    first.close()
    second = Loop(tmp_path)
    second.begin(global_step=1)
    second.plugin.on_train_end(context=second.context)
    second.close()
    assert hyperparameters(tmp_path)[1] == ["eval/accuracy"]
    assert points(tmp_path, "eval/accuracy") == [(1, 0.5)]


def test_training_can_begin_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    loop.step([2.0])
    loop.plugin.on_train_end(context=loop.context)
    loop.evaluate(0.5)
    loop.plugin.on_train_begin(context=loop.context)
    loop.step([1.0])
    loop.close()
    assert points(tmp_path, "loss/total") == [(1, 2.0), (2, 1.0)]
    assert points(tmp_path, "eval/accuracy") == [(1, 0.5)]


def test_an_evaluation_before_training_is_kept_but_not_if_a_run_is_resumed(tmp_path) -> None:
    loop = Loop(tmp_path)
    loop.evaluate(0.125)
    assert list(tmp_path.iterdir()) == []
    loop.begin()
    loop.step([1.0])
    loop.evaluate(0.5)
    loop.close()
    assert points(tmp_path, "eval/accuracy") == [(0, 0.125), (1, 0.5)]
    resumed = Loop(tmp_path)
    resumed.evaluate(0.25)
    resumed.begin(global_step=1)
    resumed.step([1.0])
    resumed.close()
    assert points(tmp_path, "eval/accuracy") == [(0, 0.125), (1, 0.5)]


def test_an_epoch_is_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    loop.step([1.0])
    loop.plugin.on_epoch_end()
    assert points(tmp_path, "loss/total") == [(1, 1.0)]
    loop.close()


def test_what_was_published_is_readable_after_an_exception(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    manager = prepare_compression(toys.mlp(), [TensorBoardConfig(tmp_path)])
    manager.on_train_begin()
    run_step(manager, 0)
    run_step(manager, 1)
    assert any("Writer" in type(t).__name__ for t in set(threading.enumerate()) - before)
    with pytest.raises(OSError, match="disk"), manager:
        raise OSError("disk")
    assert [step for step, _ in points(tmp_path, "loss/total")] == [1, 2]
    assert not any("Writer" in type(t).__name__ for t in set(threading.enumerate()) - before)


def test_nothing_is_written_before_training(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    loop = Loop(directory)
    loop.plugin.validate_composition(plugins=[loop.plugin])
    assert not directory.exists()
    loop.begin()
    assert directory.is_dir()
    loop.close()
    loop.close()


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for directory in (path, path / "run"):
        plugin = TensorBoardPlugin(TensorBoardConfig(directory=directory))
        with pytest.raises(ConfigError, match=f"because {path} is a file"):
            plugin.validate_composition(plugins=[plugin])


def test_two_instances_need_two_directories(tmp_path: Path) -> None:
    one = TensorBoardPlugin(TensorBoardConfig(directory=tmp_path / "a", name="one"))
    same = tmp_path / "b" / ".." / "a"
    two = TensorBoardPlugin(TensorBoardConfig(directory=same, name="two"))
    three = TensorBoardPlugin(TensorBoardConfig(directory=tmp_path / "c", name="three"))
    one.validate_composition(plugins=[one, three])
    with pytest.raises(ConfigError, match="'two' and 'one' both write to"):
        one.validate_composition(plugins=[one, two])


@pytest.mark.parametrize(
    "options",
    [
        {"directory": 3},
        {"directory": ""},
        {"directory": "a", "scalar_every_steps": 0},
        {"directory": "a", "scalar_every_steps": None},
        {"directory": "a", "detail_every_steps": 0},
        {"directory": "a", "detail_every_steps": 1.5},
    ],
)
def test_bad_options_are_refused(options) -> None:
    with pytest.raises(ConfigError, match=f"TensorBoardConfig.{list(options)[-1]} must"):
        TensorBoardConfig(**options)


def test_importing_the_plugin_does_not_import_tensorboard() -> None:
    code = "import compression_plugins.tensorboard, sys; print('tensorboard' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_without_training_closing_writes_and_supersedes_nothing(tmp_path: Path) -> None:
    """Post-training quantization calls no training hook."""
    earlier = Loop(tmp_path)
    earlier.begin()
    earlier.step([1.0])
    earlier.plugin.on_train_end(context=earlier.context)
    assert earlier.context.run_cleanup() == []
    inputs = torch.randn(4, 6)
    ptq = PTQConfig(calibration_data=[inputs])
    with prepare_compression(toys.mlp(), [ptq, TensorBoardConfig(tmp_path)]) as manager:
        measured = manager.sensitivity(inputs)
    events = EventAccumulator(str(tmp_path)).Reload()
    for layer in measured.layers:
        (point,) = events.Scalars(f"sensitivity/{layer.name}/output_sqnr_db")
        assert point.value == pytest.approx(layer.output_sqnr_db, rel=1e-6)
    assert len(events.Scalars("loss/total")) == 1
