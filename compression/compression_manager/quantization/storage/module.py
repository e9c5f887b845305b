"""Modules whose weights are integers: subclasses that a module of any class turns into, in place.

The class of the module is replaced by a generated subclass in which each stored weight is a
property that dequantizes. Whatever reads `module.weight` then gets floating point: the module's
own forward pass, a parent's fused kernel, a tied layer. Under the same name `_buffers` holds the
integers, so that a state_dict has them where the floats were.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, SupportsIndex, cast

import torch
from torch import Tensor, nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization.storage.weight import SCALE, WeightFormat


@dataclass(eq=False)
class StoredWeight:
    """What a module must know of one of its stored weights.

    Attributes:
        format: scheme and shape.
        dtype: floating-point type of the dequantized weight; follows the model's casts.
        requires_grad: of the Parameter before.
        channels_last: whether the Parameter had torch's channels_last memory format.
        sqnr_db: signal-to-quantization-noise ratio against the floats that were quantized, in
            decibels; None for integers that were loaded.
    """

    format: WeightFormat
    dtype: torch.dtype
    requires_grad: bool
    channels_last: bool
    sqnr_db: float | None = None

    def decode(self, buffers: Mapping[str, Tensor | None], name: str) -> Tensor:
        """Return the dequantized weight `name` of a module with these buffers."""
        tensors = {item: cast(Tensor, buffers[name + item]) for item in self.format.suffixes()}
        values = self.format.decode(tensors, self.dtype)
        if not self.channels_last:
            return values
        last = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=last)


@dataclass(eq=False)
class TiedWeight:
    """A weight that is that of another module.

    Attributes:
        owner: the module that stores it.
        name: its name there.
    """

    owner: nn.Module
    name: str


class IntegerWeights(nn.Module):
    """Mixin of all generated classes.

    Attributes:
        float_class: the class of the module before and after.
    """

    float_class: ClassVar[type[nn.Module]]

    def stored_weights(self) -> dict[str, StoredWeight]:
        """Return attribute -> description of the weights that this module itself stores."""
        # Not by attribute access: nn.Module answers a failed one with the integers.
        return cast(dict[str, StoredWeight], self.__dict__["_stored_weights"])

    def tied_weights(self) -> dict[str, TiedWeight]:
        """Return attribute -> place of the weights that another module stores."""
        return cast(dict[str, TiedWeight], self.__dict__["_tied_weights"])

    def dequantized(self, name: str) -> Tensor:
        """Return the weight `name` in floating point."""
        tied = self.tied_weights().get(name)
        if tied is not None:
            return cast(Tensor, getattr(tied.owner, tied.name))
        return self.stored_weights()[name].decode(self._buffers, name)

    def extra_repr(self) -> str:
        """Return what the float class prints, and the schemes."""
        schemes = [f"{name}={item.format.scheme}" for name, item in self.stored_weights().items()]
        tied = [f"{name}=tied" for name in self.tied_weights()]
        return ", ".join(filter(None, [super().extra_repr(), *schemes, *tied]))

    def __setattr__(self, name: str, value: Any) -> None:
        held = name in self.stored_weights() or name in self.tied_weights()
        # load_state_dict(assign=True) sets integers.
        if held and (not isinstance(value, Tensor) or value.is_floating_point()):
            raise QuantizationError(
                f"'{name}' of this {self._get_name()} is stored as integers and cannot be replaced "
                "by floating-point numbers; call dequantize_weights first."
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # A generated class has no name by which pickle could find it.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]  # missing in typeshed
            return reduced
        names = (*self.stored_weights(), *self.tied_weights())
        return (_new_module, (self.float_class, names), *reduced[2:])

    def _get_name(self) -> str:
        return self.float_class.__name__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = self.stored_weights()
        scales = {name + SCALE: cast(Tensor, self._buffers[name + SCALE]) for name in stored}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for item in stored.values():
            item.dtype = fn(torch.empty(0, dtype=item.dtype)).dtype
        for name, before in scales.items():
            after = cast(Tensor, self._buffers[name])
            if after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = self.stored_weights()
        mismatches = [
            item.format.find_mismatch(state_dict, prefix + name) for name, item in stored.items()
        ]
        if any(mismatches):
            # torch raises these; before that it would have copied the numbers, as integers.
            error_msgs.extend(filter(None, mismatches))
            return
        for name, item in stored.items():
            if prefix + name in state_dict:
                item.sqnr_db = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class RecurrentIntegerWeights(IntegerWeights):
    """Mixin for `nn.RNNBase`, which hands its kernels a list of all weights."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        """Keep no list: it would hold the floats."""

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...

    def flatten_parameters(self) -> None:
        """Do nothing: there is no memory of parameters to rearrange."""


def store_weights(
    module: nn.Module,
    stored: Mapping[str, tuple[StoredWeight, Mapping[str, Tensor]]],
    tied: Mapping[str, TiedWeight],
) -> None:
    """Replace Parameters of `module` by integers; if that fails, nothing is changed.

    Args:
        module: of any class.
        stored: attribute -> description, and suffix -> tensor.
        tied: attribute -> where its weight is stored.

    Raises:
        QuantizationError: the class of the module cannot be derived from.
    """
    kind: Any = type(module)
    try:
        module.__class__ = integer_class(kind, (*stored, *tied))
    except Exception as error:  # whatever the class does in __init_subclass__
        raise QuantizationError(
            f"a {kind.__name__} cannot hold integer weights, because its class cannot be derived "
            f"from ({error}); leave it out with skip."
        ) from error
    order = tuple(module._parameters)
    module.__dict__.pop("_flat_weights", None)
    module.__dict__.update(
        _stored_weights={name: item for name, (item, _) in stored.items()},
        _tied_weights=dict(tied),
        _parameter_order=order,
    )
    for name in (*stored, *tied):
        del module._parameters[name]
    for name, (_, tensors) in stored.items():
        for suffix, tensor in tensors.items():
            module._buffers[name + suffix] = tensor


def restore_weights(module: IntegerWeights, parameters: Mapping[str, nn.Parameter]) -> None:
    """Turn the module back into one of its float class, with these Parameters."""
    for name, item in module.stored_weights().items():
        for suffix in item.format.suffixes():
            del module._buffers[name + suffix]
    module.__class__ = module.float_class  # type: ignore[assignment]  # mypy allows no class change
    state = module.__dict__
    order = state.pop("_parameter_order")
    del state["_stored_weights"], state["_tied_weights"]
    every = {**module._parameters, **parameters}
    # Optimizers number the parameters, so that their order must be the old one.
    ordered = {name: every.pop(name) for name in order if name in every} | every
    module._parameters.clear()
    module._parameters.update(ordered)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


@functools.lru_cache(maxsize=256)
def integer_class(float_class: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of `float_class` whose weights `names` are dequantized when read."""
    mixin = IntegerWeights
    if issubclass(float_class, nn.RNNBase):
        mixin = RecurrentIntegerWeights

    def fill(namespace: dict[str, Any]) -> None:
        namespace |= {name: property(_reader(name)) for name in names}
        namespace |= {"float_class": float_class, "__module__": __name__}
        namespace["__doc__"] = float_class.__doc__

    return cast(
        type[nn.Module],
        types.new_class(f"IntegerWeight{float_class.__name__}", (mixin, float_class), {}, fill),
    )


def _reader(name: str) -> Callable[[IntegerWeights], Tensor]:
    return lambda module: module.dequantized(name)


def _new_module(float_class: Any, names: tuple[str, ...]) -> Any:
    """Return an instance without state, which pickle and deepcopy fill."""
    kind = integer_class(float_class, names)
    return kind.__new__(kind)
