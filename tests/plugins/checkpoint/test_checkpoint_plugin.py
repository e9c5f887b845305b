"""The checkpoint plugin, driven through its hooks."""

import json
import math
import os
from typing import ClassVar

import pluggy
import pytest
import torch
from torch import nn

from compression_manager.context import Context
from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
)
from compression_manager.plugin import PROJECT_NAME
from compression_manager.state import find_checkpoint, read_checkpoint
from compression_plugins.checkpoint import CheckpointConfig, CheckpointPlugin, best_checkpoint
from compression_plugins.checkpoint import plugin as plugin_module


class Run:
    """A plugin in a training of its own, with a model whose weight is the global step.

    The one before it in the same folder has ended then, as with its process.
    """

    _present: ClassVar = {}

    def __init__(self, root, resume=None, **options):
        if root in self._present:
            self._present.pop(root).context.run_cleanup()
        self.root = root
        self.context = Context(nn.Linear(1, 1), recipe={})
        self.context._collect_state = self.collect
        self.plugin = CheckpointPlugin(CheckpointConfig(root, **options))
        self.plugin.validate_composition([self.plugin])
        if resume is not None:
            state = read_checkpoint(resume)
            self.context.epoch, self.context.global_step = state["epoch"], state["global_step"]
            self.plugin.load_state_dict(state["plugins"]["checkpoint"])
        self.plugin.on_train_begin(self.context)
        self._present[root] = self

    def collect(self):
        return {
            "epoch": self.context.epoch,
            "global_step": self.context.global_step,
            "model": {"w": torch.tensor([float(self.context.global_step)])},
            "plugins": {"checkpoint": self.plugin.state_dict()},
        }

    def epoch(self, number, steps=1, **metrics):
        self.context.epoch = number
        for _ in range(steps):
            self.context.global_step += 1
            self.plugin.on_step_end(self.context)
        if metrics:
            self.plugin.on_after_eval(self.context, metrics)
        self.plugin.on_epoch_end(self.context)

    @property
    def kept(self):
        """Global steps of the checkpoints on disk, each of them loadable."""
        names = sorted(name for name in os.listdir(self.root) if name != "index.json")
        assert [read_checkpoint(self.root / name)["global_step"] for name in names] == [
            int(name.removeprefix("step-")) for name in names
        ]
        return [int(name.removeprefix("step-")) for name in names]

    @property
    def index(self):
        return json.loads((self.root / "index.json").read_text())["checkpoints"]


def test_saves_every_nth_epoch_under_its_global_step(tmp_path):
    run = Run(tmp_path, save_every_epochs=2, keep_last=9)
    for epoch in range(5):
        run.epoch(epoch, steps=3)
    assert sorted(os.listdir(tmp_path)) == ["index.json", "step-00000006", "step-00000012"]
    assert read_checkpoint(tmp_path / "step-00000012")["model"]["w"].tolist() == [12.0]


def test_saves_every_nth_step_once_per_optimizer_step(tmp_path, monkeypatch):
    run = Run(tmp_path, save_every_epochs=None, save_every_steps=2, keep_last=9)
    written = []
    original = plugin_module.write_checkpoint
    monkeypatch.setattr(
        plugin_module,
        "write_checkpoint",
        lambda path, *args, **kwargs: (written.append(path.name), original(path, *args, **kwargs)),
    )
    run.plugin.on_step_end(run.context)  # accumulating gradients: no optimizer step yet
    run.epoch(0, steps=5)
    for _ in range(3):
        run.plugin.on_step_end(run.context)
    run.context.global_step += 1
    for _ in range(3):
        run.plugin.on_step_end(run.context)
    assert written == ["step-00000002", "step-00000004", "step-00000006"]


def test_resumed_step_counter_does_not_save_the_same_step_again(tmp_path, monkeypatch):
    Run(tmp_path, save_every_epochs=None, save_every_steps=2).epoch(0, steps=2)
    run = Run(tmp_path, tmp_path / "step-00000002", save_every_epochs=None, save_every_steps=2)
    monkeypatch.setattr(plugin_module, "write_checkpoint", None)
    run.plugin.on_step_end(run.context)  # a micro-batch before the next optimizer step


def test_epoch_end_replaces_the_step_checkpoint_of_the_same_step(tmp_path):
    run = Run(tmp_path, save_every_steps=2, metric="accuracy")
    run.epoch(0, steps=2, accuracy=0.5)
    assert run.kept == [2]
    assert run.index == [
        {"name": "step-00000002", "epoch": 0, "global_step": 2, "metric": 0.5, "best": True}
    ]


@pytest.mark.parametrize(
    ("options", "values", "kept", "best"),
    [
        ({"metric": "m"}, [0.1, 0.9, 0.5, 0.4], [2, 4], 2),
        ({"metric": "m", "lower_is_better": True}, [0.4, 0.1, 0.5, 0.3], [2, 4], 2),
        ({"metric": "m", "keep_best_n": 2}, [0.9, 0.1, 0.8, 0.2, 0.3], [1, 3, 5], 1),
        ({"metric": "m", "keep_best_n": 0}, [0.9, 0.1, 0.2], [3], 3),
        ({"metric": "m", "keep_last": 2}, [0.9, 0.1, 0.2, 0.3], [1, 3, 4], 1),
        ({"metric": "m"}, [0.5, 0.5, 0.5], [1, 3], 1),
        ({"metric": "m"}, [math.nan, 0.1, math.nan, math.nan], [2, 4], 2),
        ({"metric": "m", "lower_is_better": True}, [math.nan, 3.0, math.nan], [2, 3], 2),
        ({"metric": "m"}, [math.nan, math.nan], [2], None),
        ({"metric": "m"}, [math.inf, 0.5, 0.6], [1, 3], 1),
        ({}, [0.9, 0.1, 0.2], [3], None),
        ({"keep_last": 2, "keep_best_n": 5}, [0.9, 0.1, 0.2], [2, 3], None),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path, options, values, kept, best):
    run = Run(tmp_path, **options)
    for epoch, value in enumerate(values):
        run.epoch(epoch, m=value)
    assert run.kept == kept
    assert [entry["global_step"] for entry in run.index] == kept
    assert [entry["global_step"] for entry in run.index if entry["best"]] == [
        step for step in [best] if step is not None
    ]
    assert find_checkpoint(tmp_path).name == f"step-{kept[-1]:08d}"
    if best is None:
        with pytest.raises(CheckpointError, match="best"):
            best_checkpoint(tmp_path)
    else:
        assert best_checkpoint(tmp_path) == tmp_path / f"step-{best:08d}"


def test_metrics_belong_to_their_own_epoch(tmp_path):
    run = Run(tmp_path, metric="m", keep_last=9)
    run.epoch(0, m=0.5)
    run.epoch(1)
    assert [entry["metric"] for entry in run.index] == [0.5, None]


def test_manifest_is_for_people(tmp_path):
    run = Run(tmp_path, metric="m")
    run.epoch(3, steps=2, m=0.5, loss=math.nan, tensor=torch.tensor(2.0))
    document = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    metadata = document["metadata"]
    assert metadata.pop("run").keys() == {"environment", "layers", "notes"}
    assert metadata == {
        "epoch": 3,
        "global_step": 2,
        "metrics": {"m": 0.5, "loss": "nan", "tensor": 2.0},
    }


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("options", [{"keep_best_n": 2}, {"keep_last": 2}, {"save_every_steps": 1}])
def test_retention_continues_after_resume_as_if_uninterrupted(tmp_path, cut, options):
    values = [0.5, 0.9, 0.1, 0.7, 0.6, 0.8]
    whole = Run(tmp_path / "whole", metric="m", **options)
    first = Run(tmp_path / "parts", metric="m", **options)
    for epoch, value in enumerate(values):
        whole.epoch(epoch, steps=2, m=value)
        if epoch < cut:
            first.epoch(epoch, steps=2, m=value)
    second = Run(tmp_path / "parts", find_checkpoint(tmp_path / "parts"), metric="m", **options)
    for epoch in range(cut, len(values)):
        second.epoch(epoch, steps=2, m=values[epoch])
    assert second.kept == whole.kept
    assert second.index == whole.index
    assert second.plugin.state_dict() == whole.plugin.state_dict()


def test_evaluation_before_a_step_checkpoint_counts_after_resume(tmp_path):
    run = Run(tmp_path, metric="m", save_every_steps=1, keep_last=9)
    run.context.epoch = 0
    run.plugin.on_after_eval(run.context, {"m": 0.5})
    run.context.global_step = 1
    run.plugin.on_step_end(run.context)
    resumed = Run(tmp_path, tmp_path / "step-00000001", metric="m", save_every_steps=1)
    resumed.plugin.on_epoch_end(resumed.context)
    assert resumed.index[-1]["metric"] == 0.5


def test_values_of_another_metric_are_forgotten(tmp_path):
    Run(tmp_path, metric="accuracy").epoch(0, accuracy=0.9)
    run = Run(tmp_path, tmp_path / "step-00000001", metric="loss", lower_is_better=True)
    run.epoch(1, loss=2.0)
    assert run.kept == [2]
    assert [entry["metric"] for entry in run.index] == [2.0]


def test_old_ones_go_only_after_the_new_one_and_the_index_are_safe(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.epoch(0)

    def check(path):
        assert path.name == "step-00000001"
        assert read_checkpoint(tmp_path / "step-00000002")["global_step"] == 2
        assert [entry["name"] for entry in run.index] == ["step-00000002"]
        raise OSError("busy")

    monkeypatch.setattr(plugin_module, "remove_directory", check)
    with pytest.raises(CheckpointError, match="step-00000001"):
        run.epoch(1)


def test_a_kill_before_the_removal_is_made_up_for_after_resume(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.epoch(0)
    with monkeypatch.context() as patch:
        patch.setattr(plugin_module, "remove_directory", lambda path: None)
        run.epoch(1)
    assert run.kept == [1, 2]
    resumed = Run(tmp_path, find_checkpoint(tmp_path))
    resumed.epoch(2)
    assert resumed.kept == [3]


def test_a_checkpoint_that_is_written_again_is_not_removed_as_obsolete(tmp_path):
    run = Run(tmp_path)
    run.plugin.load_state_dict({**run.plugin.state_dict(), "obsolete": ["step-00000001"]})
    run.epoch(0)
    assert run.kept == [1]


def test_a_failing_write_keeps_the_old_checkpoint_and_the_books(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.epoch(0)
    before = run.plugin.state_dict(), run.index

    def fail(*args, **kwargs):
        raise CheckpointError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(plugin_module, "write_checkpoint", fail)
        with pytest.raises(CheckpointError, match="disk full"):
            run.epoch(1)
    assert run.kept == [1]
    assert (run.plugin.state_dict(), run.index) == before


def test_checkpoints_that_people_removed_are_forgotten(tmp_path):
    run = Run(tmp_path, metric="m")
    run.epoch(0, m=0.9)
    for path in (tmp_path / "step-00000001").iterdir():
        path.unlink()
    (tmp_path / "step-00000001").rmdir()
    run.epoch(1, m=0.5)
    assert best_checkpoint(tmp_path).name == "step-00000002"


def test_another_trainings_checkpoints_are_not_mixed_with(tmp_path):
    Run(tmp_path).epoch(0, steps=5)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=r"step-00000005.*manager\.resume"):
        Run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_newer_checkpoints_than_the_one_that_was_resumed_are_warned_of(tmp_path):
    run = Run(tmp_path, save_every_steps=2, keep_last=9)
    run.epoch(0, steps=6)
    with pytest.warns(UserWarning, match="newer than step 2.*: step-00000004, step-00000006"):
        Run(tmp_path, tmp_path / "step-00000002", save_every_steps=2, keep_last=9)
    Run(tmp_path, tmp_path / "step-00000006", save_every_steps=2, keep_last=9)
    # One that is damaged is why an older one was chosen.
    (tmp_path / "step-00000006" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="newer than step 4.*: step-00000006"):
        Run(tmp_path, tmp_path / "step-00000004", save_every_steps=2, keep_last=9)


def test_resume_from_elsewhere_starts_books_of_its_own(tmp_path):
    Run(tmp_path / "a").epoch(0)
    run = Run(tmp_path / "b", tmp_path / "a" / "step-00000001")
    run.epoch(1)
    assert run.kept == [2]
    assert os.listdir(tmp_path / "a") != []


def test_missing_metric_names_the_nearest(tmp_path):
    run = Run(tmp_path, metric="acuracy")
    with pytest.raises(ConfigError, match=r"'acuracy'.*did you mean 'accuracy'"):
        run.epoch(0, accuracy=0.5)


def test_requires_evaluation_only_for_a_metric(tmp_path):
    required = {"on_epoch_begin"}
    assert Run(tmp_path).plugin.required_hooks() == required
    assert Run(tmp_path, metric="m").plugin.required_hooks() == {*required, "on_after_eval"}


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_is_refused_at_prepare(tmp_path, below):
    (tmp_path / "taken").write_text("precious")
    with pytest.raises(ConfigError, match="taken is a file"):
        Run(tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "precious"


def test_a_training_that_saves_nothing_leaves_nothing(tmp_path):
    plugin = CheckpointPlugin(CheckpointConfig(tmp_path / "new"))
    plugin.validate_composition([plugin])
    assert os.listdir(tmp_path) == []
    Run(tmp_path / "new").context.run_cleanup()
    assert os.listdir(tmp_path) == []


def test_two_instances_need_two_folders(tmp_path):
    plugins = [
        CheckpointPlugin(CheckpointConfig(tmp_path / "a", name="one")),
        CheckpointPlugin(CheckpointConfig(str(tmp_path / "b" / ".." / "a"), name="two")),
    ]
    with pytest.raises(ConfigError, match="'one' and 'two'"):
        plugins[0].validate_composition(plugins)


def test_saves_after_all_other_plugins(tmp_path):
    """The place in the user's list has no meaning."""
    manager = pluggy.PluginManager(PROJECT_NAME)
    plugin = CheckpointPlugin(CheckpointConfig(tmp_path))
    manager.register(plugin)
    for hook in ("on_step_end", "on_epoch_end"):
        assert manager.parse_hookimpl_opts(plugin, hook)["trylast"]


@pytest.mark.parametrize(
    "change",
    [
        {"saved": [{"name": "step-00000001"}]},
        {"saved": 3},
        {"obsolete": ["../precious"]},
        {"obsolete": [3]},
        {"saved": [{"name": "..", "epoch": 0, "global_step": 0, "metric": None}]},
        {"metric": "remove"},
    ],
    ids=str,
)
def test_foreign_state_changes_nothing(tmp_path, change):
    run = Run(tmp_path)
    run.epoch(0)
    before = run.plugin.state_dict()
    state = {**before, **change}
    if change == {"metric": "remove"}:
        del state["metric"]
    with pytest.raises(CheckpointMismatchError, match="checkpoint"):
        run.plugin.load_state_dict(state)
    assert run.plugin.state_dict() == before


def test_damaged_checkpoint_of_another_training_is_named(tmp_path):
    Run(tmp_path).epoch(0)
    (tmp_path / "step-00000001" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointCorruptError, match="step-00000001"):
        Run(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"directory": ""},
        {"directory": 3},
        {"save_every_epochs": 0},
        {"save_every_epochs": None},
        {"save_every_steps": -1},
        {"save_every_steps": True},
        {"keep_best_n": -1},
        {"keep_best_n": 1.0},
        {"keep_last": 0},
        {"metric": ""},
        {"lower_is_better": 1},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CheckpointConfig(**{"directory": "runs", **options})


def test_entry_points_lead_to_the_plugins():
    from importlib.metadata import entry_points

    found = entry_points(group="compression_manager.plugins.v1")
    for name in ("checkpoint", "early_stopping"):
        plugin = found[name].load()
        assert plugin.config_class.plugin == name
