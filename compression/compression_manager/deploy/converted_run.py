"""One call of a converted model, and what it shows besides its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from compression_manager.deploy.layers.lazy_weight import noting_reads
from compression_manager.deploy.replacement import Replacement
from compression_manager.errors import ParityError
from compression_manager.models.calling import (
    call_model,
    quiet_evaluation,
    tensors_in,
    without_compiled_code,
)

_REMEDY = "leave {layers} out with LayerRule(layer=..., skip=True)"


@dataclass(frozen=True)
class ConvertedRun:
    """What one call showed.

    Attributes:
        outputs: the tensors in the model's output.
        read_weights: names of the replaced layers whose weight the model's own code read.
    """

    outputs: list[Tensor]
    read_weights: tuple[str, ...]


def run_converted(
    model: nn.Module, replacements: Sequence[Replacement], reached: Iterable[str], inputs: Any
) -> ConvertedRun:
    """Call a converted model.

    Args:
        model: what is called, in eval mode.
        replacements: its converted layers.
        reached: names of those that the trained model calls.
        inputs: what it is called with.

    Raises:
        ParityError: the model fails, or does not call a layer that is `reached`.
    """
    called: set[str] = set()
    try:
        with ExitStack() as stack, quiet_evaluation(model, restore_buffers=True):
            for name, layer in ((item.name, item.layer) for item in replacements):
                handle = layer.register_forward_pre_hook(partial(_note_call, called, name))
                stack.callback(handle.remove)
            with without_compiled_code(), noting_reads() as read:
                outputs = list(tensors_in(call_model(model, inputs)))
    except Exception as error:
        raise ParityError(
            f"the converted model fails where the trained one works: {error!r}. Its code probably "
            f"uses the weight of a quantized layer itself; {_REMEDY.format(layers='that layer')}."
        ) from error
    missing = next((name for name in reached if name not in called), None)
    if missing is not None:
        raise ParityError(
            f"the converted model does not call its layer '{missing}', as the trained one does: "
            "something in the model holds on to the layers that are trained, such as a function "
            "that was set as an attribute."
        )
    read_weights = (item.name for item in replacements if id(item.layer) in read)
    return ConvertedRun(outputs, tuple(read_weights))


def describe_reads(layers: Sequence[str]) -> str:
    """Return what weights that the model's own code reads mean; "" if there are none."""
    if not layers:
        return ""
    names = ", ".join(f"'{name}'" for name in layers)
    return (
        f"the model's own code reads the weight of {names}, which was not rounded there while it "
        f"trained and is now; {_REMEDY.format(layers='what it reads')}, or let a layer that "
        "shares the weight compute (head.weight = embedding.weight)"
    )


def _note_call(called: set[str], name: str, *_: Any) -> None:
    called.add(name)
