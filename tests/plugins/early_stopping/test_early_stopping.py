"""Early stopping, driven through its hooks."""

import math

import pytest
from torch import nn

from compression_manager.context import Context
from compression_manager.errors import CheckpointMismatchError, ConfigError
from compression_plugins.early_stopping import EarlyStoppingConfig, EarlyStoppingPlugin


class Run:
    """A plugin in a training of its own."""

    def __init__(self, state=None, **options):
        self.context = Context(nn.Linear(1, 1), recipe={})
        self.plugin = EarlyStoppingPlugin(EarlyStoppingConfig(**{"metric": "accuracy", **options}))
        if state is not None:
            self.plugin.load_state_dict(state)
        self.plugin.on_train_begin(self.context)

    def evaluate(self, *values):
        """Return the number of evaluations after which it stopped, or None."""
        for count, value in enumerate(values, 1):
            self.plugin.on_after_eval(self.context, {self.plugin.config.metric: value})
            if self.context.should_stop:
                return count
        return None


@pytest.mark.parametrize(
    ("options", "values", "stops_after"),
    [
        ({"patience": 2}, [0.5, 0.6, 0.6, 0.6], 4),
        ({"patience": 2}, [0.5, 0.6, 0.6, 0.7, 0.7], None),
        ({"patience": 2}, [0.5, 0.4, 0.45], 3),
        ({"patience": 1}, [0.5, 0.5], 2),
        ({"patience": 1, "min_delta": 0.01}, [0.80, 0.82, 0.81], 3),
        ({"patience": 1, "min_delta": 0.01}, [0.80, 0.8101], None),
        # Exactly min_delta is not more, although 0.81 - 0.80 > 0.01 in binary.
        ({"patience": 1, "min_delta": 0.01}, [0.80, 0.81], 2),
        ({"patience": 1, "min_delta": 0.1}, [0.7, 0.8], 2),
        # Small gains count against the best, not against the last one.
        ({"patience": 3, "min_delta": 0.1}, [0.5, 0.55, 0.58, 0.61, 0.6], None),
        ({"patience": 1, "lower_is_better": True}, [2.0, 1.0, 0.5], None),
        ({"patience": 1, "lower_is_better": True}, [2.0, 2.5], 2),
        ({"patience": 1, "lower_is_better": True, "min_delta": 0.5}, [2.0, 1.5], 2),
        ({"patience": 2}, [math.nan, math.nan], 2),
        ({"patience": 2}, [0.5, math.nan, math.nan], 3),
        ({"patience": 2}, [math.nan, 0.1, math.nan, 0.2], None),
        ({"patience": 1}, [-math.inf, 0.5, math.inf], None),
        ({"patience": 1}, [math.inf, math.inf], 2),
        ({"patience": 1, "min_delta": 0.1}, [math.inf, 1.0], 2),
    ],
)
def test_stops_after_patience_evaluations_without_improvement(options, values, stops_after):
    assert Run(**options).evaluate(*values) == stops_after


def test_reason_says_who_what_and_how_long():
    run = Run(patience=2, min_delta=0.5)
    run.evaluate(0.25, 0.3, 0.3)
    for part in ("early_stopping", "accuracy", "0.5", "2 evaluations", "0.25"):
        assert part in run.context.stop_reason


def test_publishes_its_view():
    run = Run()
    run.evaluate(math.nan, 0.5, 0.4)
    published = [(metric.name, metric.value) for metric in run.context.metrics.drain()]
    assert published == [
        ("early_stopping/evaluations_without_improvement", 1.0),
        ("early_stopping/best", 0.5),
        ("early_stopping/evaluations_without_improvement", 0.0),
        ("early_stopping/best", 0.5),
        ("early_stopping/evaluations_without_improvement", 1.0),
    ]


def test_missing_metric_names_the_nearest():
    run = Run(metric="acuracy")
    with pytest.raises(ConfigError, match=r"'acuracy'.*did you mean 'accuracy'"):
        run.plugin.on_after_eval(run.context, {"accuracy": 0.5, "loss": 1.0})
    assert run.plugin.state_dict()["evaluations_without_improvement"] == 0


def test_needs_the_evaluation_hook():
    assert Run().plugin.required_hooks() == {"on_after_eval"}


def test_resumes_where_it_was():
    whole = Run(patience=3)
    values = [0.5, 0.4, 0.6, 0.5, 0.5, 0.5]
    for cut in range(1, len(values)):
        first = Run(patience=3)
        first.evaluate(*values[:cut])
        second = Run(first.plugin.state_dict(), patience=3)
        assert second.evaluate(*values[cut:]) == len(values) - cut
    assert whole.evaluate(*values) == len(values)


def test_resume_of_a_stopped_training_stops_again_unless_patience_grew():
    first = Run(patience=1)
    first.evaluate(0.5, 0.4)
    assert Run(first.plugin.state_dict(), patience=1).context.should_stop
    assert not Run(first.plugin.state_dict(), patience=2).context.should_stop


def test_second_fresh_training_starts_afresh():
    run = Run(patience=2)
    run.evaluate(0.5, 0.4)
    run.plugin.on_train_begin(run.context)
    assert run.evaluate(0.1, 0.1) is None


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_train_end"])
def test_a_training_after_the_resumed_one_starts_afresh(hook):
    """A loop without epochs has its end alone."""
    first = Run(patience=2)
    first.evaluate(0.5, 0.4)
    run = Run(first.plugin.state_dict(), patience=2)
    getattr(run.plugin, hook)()
    run.plugin.on_train_begin(run.context)
    assert run.evaluate(0.1, 0.1) is None


def test_a_resumed_training_that_another_plugin_refused_to_begin_goes_on():
    first = Run(patience=2)
    first.evaluate(0.5, 0.4)
    run = Run(first.plugin.state_dict(), patience=2)
    run.plugin.on_train_begin(run.context)
    assert run.evaluate(0.1) == 1


@pytest.mark.parametrize("state", [{}, {"best": 1.0}, None])
def test_foreign_state_changes_nothing(state):
    run = Run()
    run.evaluate(0.5)
    before = run.plugin.state_dict()
    foreign = {**before, "metric": "loss", "best": 3.0} if state is None else state
    with pytest.raises(CheckpointMismatchError, match="early_stopping"):
        run.plugin.load_state_dict(foreign)
    assert run.plugin.state_dict() == before


@pytest.mark.parametrize(
    "options",
    [
        {"metric": ""},
        {"metric": 3},
        {"patience": 0},
        {"patience": 1.5},
        {"patience": True},
        {"min_delta": -0.1},
        {"min_delta": math.nan},
        {"min_delta": math.inf},
        {"min_delta": "0.1"},
        {"lower_is_better": 1},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EarlyStoppingConfig(**{"metric": "accuracy", **options})
