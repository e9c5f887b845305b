"""Every hook, grouped by phase.

The training loop in pseudocode; each line in [brackets] is an event that plugins may implement:

    manager = prepare_compression(model, configs)
        [validate_composition]  [prepare_model]
    manager.on_train_begin()                                [on_train_begin]
    for epoch in range(epochs):
        manager.on_epoch_begin(epoch)                       [on_epoch_begin]
        for step, (inputs, targets) in enumerate(loader):
            manager.on_step_begin(step)                     [on_step_begin]
            output = model(inputs)
            loss = criterion(output, targets)
            loss = manager.on_after_compute_loss(inputs, output, loss)
                                                            [on_after_compute_loss]
            loss.backward()
            manager.on_before_optimizer_step()              [on_before_optimizer_step]
            optimizer.step()
            manager.on_after_optimizer_step()               [on_after_optimizer_step]
            optimizer.zero_grad()
            manager.on_step_end()                           [on_step_end] [consume_metrics]
        manager.on_before_eval()                            [on_before_eval]
        manager.on_after_eval(metrics)                      [on_after_eval] [consume_metrics]
        manager.on_epoch_end()                              [on_epoch_end] [consume_metrics]
    manager.on_train_end()                                  [on_train_end] [consume_metrics]
    manager.convert()                                       [convert_model]

Plugins run in the order in which the user listed them. An implementation may declare any
subset of a hook's parameters, by name and without defaults. Hooks marked "service" are
questions that one plugin asks and the first plugin with an answer decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compression_manager.plugin import hookspec

if TYPE_CHECKING:
    from compression_manager.context import Context
    from compression_manager.deploy.conversion import Conversion
    from compression_manager.loss import LossTerms
    from compression_manager.metrics import Metric
    from compression_manager.plugin import Plugin
    from compression_manager.quantization.observer import Observer
    from compression_manager.quantization.scheme import QuantizationScheme
    from compression_manager.quantization.site import QuantizationSite

# Part of the entry-point group. It rises when a hook or a parameter is removed or renamed, or gets
# another meaning; additions leave it as it is.
HOOK_API_VERSION = 1

# Hooks that a loop may leave out, unless a plugin cannot do without one.
OPTIONAL_HOOKS = frozenset(
    {"on_epoch_begin", "on_after_optimizer_step", "on_before_eval", "on_after_eval"}
)

# Shape: once, inside prepare_compression ------------------------------------------------------


@hookspec
def validate_composition(context: Context, plugins: Sequence[Plugin[Any]]) -> None:
    """Refuse a composition before anything is changed.

    Args:
        context: the manager's context; `context.model` is still untouched.
        plugins: all plugins in the user's order, default providers last.

    Called once, before any `prepare_model`. Must not change anything. Raises ConfigError.
    """


@hookspec
def prepare_model(context: Context) -> None:
    """Shape `context.model` in place.

    Called once, in the user's order. Every change must be undone by a callback given to
    `context.add_cleanup(callback, owner=self.name)`, so that a later failure or `close()`
    restores the float model. Parameters keep their identity.
    """


# Lifecycle: the training loop -----------------------------------------------------------------


@hookspec
def on_train_begin(context: Context, dataloader: object) -> None:
    """Training starts (again). `dataloader` is what the user passed or tracked, or None."""


@hookspec
def on_epoch_begin(context: Context, epoch: int) -> None:
    """An epoch starts, before its first batch is drawn."""


@hookspec
def on_step_begin(context: Context, step: int) -> None:
    """A step starts, before the model's forward pass. `step` counts within the epoch."""


@hookspec
def on_after_compute_loss(
    context: Context,
    losses: LossTerms,
    input: Any,
    student_output: Any,
    teacher_output: Any,
    target: Tensor | None,
    mask: Tensor | None,
    sample_ids: Any,
    num_items: int | Tensor | None,
) -> None:
    """The user's loss is known and not yet differentiated.

    Args:
        losses: add weighted terms here; the manager returns their sum to the user.
        input: what the model was called with (a mapping, a tuple or one object).
        student_output: what the model returned.
        teacher_output: the teacher's output if the caller computed it, else None.
        target: labels, if the caller passed them.
        mask: (batch, sequence) with 1 where a position counts, if the caller passed it.
        sample_ids: identities of the samples in the batch, if the caller passed them.
        num_items: positions or samples of the whole accumulated batch, if passed; for losses that
            divide by it.

    Called once per loss; several calls before one optimizer step are gradient accumulation.
    """


@hookspec
def on_before_optimizer_step(context: Context) -> None:
    """Gradients are complete; parameters are not yet updated."""


@hookspec
def on_after_optimizer_step(context: Context) -> None:
    """Parameters were updated; `context.global_step` counts this step."""


@hookspec
def on_step_end(context: Context) -> None:
    """A step is complete."""


@hookspec
def on_before_eval(context: Context) -> None:
    """The user is about to evaluate."""


@hookspec
def on_after_eval(context: Context, metrics: Mapping[str, float]) -> None:
    """The user evaluated: `metrics` maps names to numbers, for example `accuracy`."""


@hookspec
def on_epoch_end(context: Context) -> None:
    """An epoch is complete, its evaluation included."""


@hookspec
def on_train_end(context: Context) -> None:
    """Training is complete."""


@hookspec
def on_exception(context: Context, error: BaseException) -> None:
    """The body of a managed loop (`with manager`, `epochs`, `steps`) raised `error`."""


# Conversion -----------------------------------------------------------------------------------


@hookspec
def convert_model(context: Context, conversion: Conversion) -> None:
    """Replace layers of `conversion.model`, a copy of the trained model in eval mode.

    Use `conversion.replace`, which records what the parity check has to compare.
    """


# Metrics --------------------------------------------------------------------------------------


@hookspec
def publish_details(context: Context) -> None:
    """Publish what is too costly for every step (ranges, histograms) to `context.metrics`.

    Called at the end of a step in which some plugin called `context.request_details()`.
    """


@hookspec
def consume_metrics(context: Context, metrics: Sequence[Metric]) -> None:
    """Show or store what was published since the last call, oldest first."""


# Services: the first plugin with an answer decides -------------------------------------------


@hookspec(firstresult=True)
def make_observer(scheme: QuantizationScheme, site: QuantizationSite) -> Observer | None:
    """Service: return a new observer for `site`, or None to leave the answer to others."""


@hookspec(firstresult=True)
def make_fake_quantizer(scheme: QuantizationScheme, site: QuantizationSite) -> nn.Module | None:
    """Service: return a new fake quantizer for `site`, or None to leave it to others.

    The module derives from `compression_manager.quantization.FakeQuantizer`.
    """


@hookspec(firstresult=True)
def make_distillation_loss(name: str, options: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """Service: return `loss(student, teacher) -> scalar` for `name`, or None.

    Both are logits, or the features of a layer. A loss whose signature names `target`, `mask` or
    `num_items` is given what the loop passed to `on_after_compute_loss`; one that names
    `temperature`, the present temperature: a number, or a tensor with one for each position.
    `options` holds the user's options; a fixed temperature is also among them, for losses that are
    made for one. A loss of logits includes its factor T^2. What it raises names this plugin.
    """
