"""Deciding, without changing anything, which layers are quantized and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _OutputProjection
from torch.nn.utils import parametrize

from compression_manager.errors import ConfigError, blame_option, suggest
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.layers import (
    QUANTIZED_CLASSES,
    Operand,
    QuantizedLayer,
    quantized_class,
)
from compression_plugins.fake_quant.config import LayerRule, SchemeOptions

# Only the quantized form of MultiheadAttention calls its output projection.
_NOT_CALLED = "MultiheadAttention uses its weight without calling it"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is going to be quantized.

    Attributes:
        name: qualified name of the layer.
        weight: scheme of its weights; None if it has none.
        activation: scheme of its inputs; None leaves them in floating point.
    """

    name: str
    weight: QuantizationScheme | None
    activation: QuantizationScheme | None


@dataclass(frozen=True)
class ModelPlan:
    """The layers to quantize, in the model's order, and the reasons for all others."""

    layers: tuple[LayerPlan, ...]
    skipped: dict[str, str]


def plan_model(model: nn.Module, config: SchemeOptions) -> ModelPlan:
    """Return what `config` means for `model`.

    Raises:
        ConfigError: a rule has no effect, a scheme does not fit a layer, the model is prepared
            already, or nothing would be quantized.
    """
    _refuse_prepared(model)
    candidates = _candidates(model)
    names = _all_names(model)
    unsupported = _find_unsupported(candidates)
    for index, rule in enumerate(config.overrides):
        selector = "layer" if rule.layer is not None else "module_class"
        with blame_option(f"overrides[{index}].{selector}"):
            _check_rule(rule, model, candidates, names, unsupported)
    layers: list[LayerPlan] = []
    skipped: dict[str, str] = {}
    for name, module in candidates.items():
        match = _last_match(config.overrides, names[name], module)
        if match is not None and config.overrides[match].skip:
            skipped[name] = f"skipped by {config.overrides[match]}"
        elif name in unsupported:
            skipped[name] = unsupported[name]
        elif _is_output_projection(module) and _parent(name) in skipped:
            skipped[name] = _NOT_CALLED
        else:
            planned = _plan_layer(name, module, config, match)
            if planned.weight is None and planned.activation is None:
                skipped[name] = "it has no weight, and its inputs are to stay in floating point"
            else:
                layers.append(planned)
    if not layers:
        supported = [kind.__name__ for kind in QUANTIZED_CLASSES if kind is not _OutputProjection]
        raise ConfigError(
            f"{type(config).__name__} would quantize nothing: "
            f"{_listed(skipped) or 'the model has no layers'}. "
            f"Supported layers: {', '.join(supported)}."
        )
    return ModelPlan(tuple(layers), skipped)


def operands_of(layer: nn.Module) -> dict[str, Operand]:
    """Return part -> operand of a layer that has a quantized form."""
    kind = quantized_class(type(layer))
    assert kind is not None
    return kind.operands_of(layer)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module that owns parameters or has a quantized form."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        or parametrize.is_parametrized(module)
        or quantized_class(type(module)) is not None
    }


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return first name -> all names of each module, as which rules may call it."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {own[0]: own for own in names.values()}


def _find_unsupported(candidates: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the reason against each candidate that cannot be quantized."""
    found: dict[str, str] = {}
    for name, module in candidates.items():
        reason = _reason_against(module)
        if reason is None and _is_output_projection(module):
            parent = _parent(name)
            called = type(candidates.get(parent)) is nn.MultiheadAttention and parent not in found
            reason = None if called else _NOT_CALLED
        if reason is not None:
            found[name] = reason
    return found


def _is_output_projection(module: nn.Module) -> bool:
    return type(module) is _OutputProjection


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _plan_layer(
    name: str, module: nn.Module, config: SchemeOptions, rule_index: int | None
) -> LayerPlan:
    weight, weight_option = config.weight, "weight"
    activation = config.activation
    if rule_index is not None:
        rule = config.overrides[rule_index]
        if rule.weight is not None:
            weight, weight_option = rule.weight, f"overrides[{rule_index}].weight"
        activation = None if rule.weight_only else rule.activation or activation
    kind = quantized_class(type(module))
    if kind is not None and not kind.quantizes_input:
        activation = None
    weights = [item.weight for item in operands_of(module).values() if item.weight is not None]
    for axes in {item.dim() for item in weights}:
        if weight.axis is not None and not -axes <= weight.axis < axes:
            with blame_option(f"{weight_option}.axis"):
                raise ConfigError(
                    f"layer '{name}': axis {weight.axis} of the weight's scheme does not exist; "
                    f"the weight of a {type(module).__name__} has the axes 0 to {axes - 1}."
                )
    return LayerPlan(name, weight if weights else None, activation)


def _reason_against(module: nn.Module) -> str | None:
    """Return why `module` cannot be quantized, or None if it can."""
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: run one forward pass before preparing"
    if "forward" in vars(module):
        return "it has a forward of its own, set as an attribute before the model was prepared"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    kind = type(module)
    if quantized_class(kind) is None:
        base = next((base for base in QUANTIZED_CLASSES if isinstance(module, base)), None)
        if base is not None:
            return f"{kind.__name__} is a subclass of {base.__name__} with its own behaviour"
        return f"{kind.__name__} has no quantized form"
    return _reason_against_weight(module)


def _reason_against_weight(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if _is_computed_by_hook(module):
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning)"
    for _, weight in module.named_parameters(recurse=False):
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            return f"{kind} with max_norm changes its weight in forward"
        if module.sparse:
            return f"{kind} with sparse=True has no sparse gradient through fake quantization"
    return None


def _is_computed_by_hook(module: nn.Module) -> bool:
    """Return whether a plain tensor stands where a Parameter was (`weight` beside `weight_g`)."""
    return any(
        isinstance(value, Tensor) and any(key.startswith(f"{name}_") for key in module._parameters)
        for name, value in vars(module).items()
    )


def _refuse_prepared(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise ConfigError(
                f"layer '{name}' is quantization-aware already; close the manager that prepared "
                "this model before preparing it again."
            )


def _check_rule(
    rule: LayerRule,
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    names: Mapping[str, Sequence[str]],
    unsupported: Mapping[str, str],
) -> None:
    """Raise ConfigError if the rule has no effect on any layer."""
    hit = [name for name, module in candidates.items() if _matches(rule, names[name], module)]
    if not hit:
        raise ConfigError(f"{rule} matches no layer; {_near(rule, model, candidates)}")
    if not rule.skip and all(name in unsupported for name in hit):
        reasons = _listed({name: unsupported[name] for name in hit})
        raise ConfigError(f"{rule} matches only layers that cannot be quantized: {reasons}.")


def _near(rule: LayerRule, model: nn.Module, candidates: Mapping[str, nn.Module]) -> str:
    """Return what the user may have meant."""
    for name, module in model.named_modules():
        inside = any(candidate.startswith(f"{name}.") for candidate in candidates)
        if name and inside and _matches(rule, (name,), module):
            return (
                f"'{name}' is a container without parameters of its own; "
                f"LayerRule(layer='{name}.*') matches all layers inside."
            )
    if rule.layer is not None:
        return suggest(rule.layer, [name for name in candidates if name])
    return suggest(str(rule.module_class), {type(item).__name__ for item in candidates.values()})


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name or 'the model'}: {why}" for name, why in reasons.items())


def _last_match(rules: Sequence[LayerRule], names: Sequence[str], module: nn.Module) -> int | None:
    """Return the index of the rule that applies."""
    matching = [index for index, rule in enumerate(rules) if _matches(rule, names, module)]
    return matching[-1] if matching else None


def _matches(rule: LayerRule, names: Sequence[str], module: nn.Module) -> bool:
    if rule.layer is not None:
        return any(name == rule.layer or fnmatchcase(name, rule.layer) for name in names)
    return any(base.__name__ == rule.module_class for base in type(module).__mro__)
