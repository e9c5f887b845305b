"""A plugin that records every event it receives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from compression_manager import hookspecs
from compression_manager.context import Context
from compression_manager.deploy.conversion import Conversion
from compression_manager.loss import LossTerms
from compression_manager.metrics import Metric
from compression_manager.plugin import Plugin, PluginConfig, hookimpl
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite

HOOKS: Mapping[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)
    for name, function in vars(hookspecs).items()
    if hasattr(function, "compression_manager_spec")
}
"""Hook -> its parameters, in the order of `compression_manager.hookspecs`."""


@dataclass(frozen=True)
class Event:
    """One call of a hook.

    Attributes:
        plugin: name of the recording plugin that was called.
        hook: name of the hook.
        arguments: all of its parameters by name; the live objects, not copies.
    """

    plugin: str
    hook: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class RecordingConfig(PluginConfig):
    """Only a name; `RecordingPlugin(RecordingConfig(name="first"))` tells instances apart."""

    plugin: ClassVar[str] = "recording"


class RecordingPlugin(Plugin[RecordingConfig]):
    """Records the events it receives, in order, with their arguments, and changes nothing.

    It implements every hook, answers no service, and stands in the list as an instance:
    `prepare_compression(model, [recording := RecordingPlugin(), MyConfig()])`.

    Args:
        config: its name, where there are several.
        events: the list to append to; give several instances the same one to see their order.
    """

    config_class = RecordingConfig

    def __init__(
        self, config: RecordingConfig | None = None, events: list[Event] | None = None
    ) -> None:
        super().__init__(RecordingConfig() if config is None else config)
        self.events: list[Event] = [] if events is None else events

    @property
    def hooks(self) -> list[str]:
        """Names of the hooks that were called, in order."""
        return [event.hook for event in self.events]

    def arguments(self, hook: str) -> list[Mapping[str, Any]]:
        """Return the arguments of every call of `hook`, in order."""
        return [event.arguments for event in self.events if event.hook == hook]

    def _record(self, hook: str, arguments: Mapping[str, Any]) -> None:
        given = {name: value for name, value in arguments.items() if name != "self"}
        self.events.append(Event(self.name, hook, given))

    # One method per hook, in full: pluggy reads the parameters from the code.

    @hookimpl
    def validate_composition(self, context: Context, plugins: Sequence[Plugin[Any]]) -> None:
        self._record("validate_composition", locals())

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        self._record("prepare_model", locals())

    @hookimpl
    def on_train_begin(self, context: Context, dataloader: object) -> None:
        self._record("on_train_begin", locals())

    @hookimpl
    def on_epoch_begin(self, context: Context, epoch: int) -> None:
        self._record("on_epoch_begin", locals())

    @hookimpl
    def on_step_begin(self, context: Context, step: int) -> None:
        self._record("on_step_begin", locals())

    @hookimpl
    def on_after_compute_loss(
        self,
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
        self._record("on_after_compute_loss", locals())

    @hookimpl
    def on_before_optimizer_step(self, context: Context) -> None:
        self._record("on_before_optimizer_step", locals())

    @hookimpl
    def on_after_optimizer_step(self, context: Context) -> None:
        self._record("on_after_optimizer_step", locals())

    @hookimpl
    def on_step_end(self, context: Context) -> None:
        self._record("on_step_end", locals())

    @hookimpl
    def on_before_eval(self, context: Context) -> None:
        self._record("on_before_eval", locals())

    @hookimpl
    def on_after_eval(self, context: Context, metrics: Mapping[str, float]) -> None:
        self._record("on_after_eval", locals())

    @hookimpl
    def on_epoch_end(self, context: Context) -> None:
        self._record("on_epoch_end", locals())

    @hookimpl
    def on_train_end(self, context: Context) -> None:
        self._record("on_train_end", locals())

    @hookimpl
    def on_exception(self, context: Context, error: BaseException) -> None:
        self._record("on_exception", locals())

    @hookimpl
    def convert_model(self, context: Context, conversion: Conversion) -> None:
        self._record("convert_model", locals())

    @hookimpl
    def publish_details(self, context: Context) -> None:
        self._record("publish_details", locals())

    @hookimpl
    def consume_metrics(self, context: Context, metrics: Sequence[Metric]) -> None:
        self._record("consume_metrics", locals())

    @hookimpl
    def make_observer(self, scheme: QuantizationScheme, site: QuantizationSite) -> None:
        self._record("make_observer", locals())

    @hookimpl
    def make_fake_quantizer(self, scheme: QuantizationScheme, site: QuantizationSite) -> None:
        self._record("make_fake_quantizer", locals())

    @hookimpl
    def make_distillation_loss(self, name: str, options: Mapping[str, Any]) -> None:
        self._record("make_distillation_loss", locals())
