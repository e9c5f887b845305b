"""The plugin: when to prune, and how pruned weights stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression_magnitude_pruning.config import MagnitudePruningConfig
from compression_magnitude_pruning.masks import prune, select_weights
from compression_manager import CheckpointMismatchError, Context, Plugin, hookimpl
from compression_manager.deploy import Conversion


class MagnitudePruningPlugin(Plugin[MagnitudePruningConfig]):
    """Prunes while the model trains; what is zero once stays zero.

    Publishes `magnitude_pruning/sparsity` and `magnitude_pruning/sparsity/<weight>` (with the
    instance's name in front) whenever it prunes.
    """

    config_class = MagnitudePruningConfig

    def __init__(self, config: MagnitudePruningConfig) -> None:
        super().__init__(config)
        self._names: list[str] = []
        self._masks: dict[str, Tensor] = {}  # by name of the weight; True where it is kept
        self._sparsity = 0.0

    def required_hooks(self) -> frozenset[str]:
        """Return the hook in which weights are set to zero again, and the one of the schedule."""
        schedule = {"on_epoch_begin"} if self.config.start.step is None else set()
        return frozenset({"on_after_optimizer_step", *schedule})

    @hookimpl
    def validate_composition(self, context: Context) -> None:
        """Choose the weights, by the names that they have before other plugins add their own."""
        self._names = select_weights(context.model, self.config.include, self.config.exclude)

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        """Start with masks that keep everything; the model itself stays as it is."""
        self._masks = {
            name: torch.ones_like(context.model.get_parameter(name), dtype=torch.bool)
            for name in self._names
        }

    @hookimpl
    def on_train_begin(self, context: Context) -> None:
        """Prune if the schedule begins here."""
        self._follow_schedule(context)

    @hookimpl
    def on_epoch_begin(self, context: Context) -> None:
        """Prune if the schedule counts epochs."""
        self._follow_schedule(context)

    @hookimpl
    def on_before_optimizer_step(self, context: Context) -> None:
        """Drop the gradients of pruned weights, which must not drive the optimizer's averages."""
        for weight, mask in self._masked(context.model):
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0)

    @hookimpl(tryfirst=True)  # other plugins see the weights that the next step begins with
    def on_after_optimizer_step(self, context: Context) -> None:
        """Undo what momentum did to pruned weights, then prune further."""
        self._set_to_zero(context.model)
        self._follow_schedule(context)

    @hookimpl
    def on_train_end(self, context: Context) -> None:
        """Prune the weights of an earlier epoch, if a plugin put these back."""
        self._set_to_zero(context.model)

    @hookimpl
    def convert_model(self, conversion: Conversion) -> None:
        """Leave the copy as it is: its weights hold the zeros, and masks are not part of it."""
        conversion.accept()

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, and the sparsity that they were made for."""
        return {"sparsity": self._sparsity, "masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the masks.

        Raises:
            CheckpointMismatchError: other weights were pruned.
        """
        if state["masks"].keys() != self._masks.keys():
            raise CheckpointMismatchError(
                f"plugin '{self.name}' prunes {', '.join(self._masks)}, but the checkpoint holds "
                f"masks of {', '.join(state['masks']) or 'nothing'}."
            )
        self._sparsity, self._masks = state["sparsity"], dict(state["masks"])

    def _follow_schedule(self, context: Context) -> None:
        sparsity = self.config.sparsity_at(step=context.global_step, epoch=context.epoch)
        if sparsity <= self._sparsity:
            return
        self._sparsity = sparsity
        pairs = list(self._masked(context.model))
        groups = [pairs] if self.config.scope == "global" else [[pair] for pair in pairs]
        masks = [mask for group in groups for mask in prune(group, sparsity)]
        self._masks = dict(zip(self._names, masks, strict=True))
        self._set_to_zero(context.model)
        self._publish(context)

    @torch.no_grad()
    def _set_to_zero(self, model: nn.Module) -> None:
        for weight, mask in self._masked(model):
            weight.masked_fill_(~mask, 0)

    def _masked(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every weight with its mask."""
        for name in self._names:
            weight = model.get_parameter(name)
            # A checkpoint's masks come from the CPU, and models are moved.
            self._masks[name] = self._masks[name].to(weight.device)
            yield weight, self._masks[name]

    def _publish(self, context: Context) -> None:
        zeros = {name: int((~mask).sum()) for name, mask in self._masks.items()}
        for name, mask in self._masks.items():
            context.metrics.scalar(f"{self.name}/sparsity/{name}", zeros[name] / mask.numel())
        count, total = sum(zeros.values()), sum(mask.numel() for mask in self._masks.values())
        context.metrics.scalar(f"{self.name}/sparsity", count / total)
        context.note(
            self.name,
            f"{count:,} of {total:,} weights are zero, {count / total:.1%} (in the end "
            f"{self.config.sparsity:.1%})",
        )
