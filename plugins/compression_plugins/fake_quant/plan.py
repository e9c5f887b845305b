"""Deciding, without changing anything, which layers are quantized and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from compression_manager.errors import ConfigError, suggest
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.layers import QUANTIZED_CLASSES, QuantizedLayer
from compression_plugins.fake_quant.config import LayerRule, QATConfig


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is going to be quantized; `activation` None is weight-only."""

    name: str
    weight: QuantizationScheme
    activation: QuantizationScheme | None


@dataclass(frozen=True)
class ModelPlan:
    """The layers to quantize, in the model's order, and the reasons for all others."""

    layers: tuple[LayerPlan, ...]
    skipped: dict[str, str]


def plan_model(model: nn.Module, config: QATConfig) -> ModelPlan:
    """Return what `config` means for `model`.

    Raises:
        ConfigError: a rule matches no layer, the model is prepared already, or nothing would
            be quantized.
    """
    _refuse_prepared(model)
    candidates = dict(_candidates(model))
    _check_rules(config.overrides, model)
    layers: list[LayerPlan] = []
    skipped: dict[str, str] = {}
    for name, module in candidates.items():
        rule = _last_match(config.overrides, name, module)
        reason = _reason_against(model, name, module, rule)
        if reason is not None:
            skipped[name] = reason
            continue
        layers.append(_plan_layer(name, module, config, rule))
    if not layers:
        reasons = "; ".join(f"{name or 'the model'}: {why}" for name, why in skipped.items())
        raise ConfigError(
            f"QATConfig would quantize nothing: {reasons or 'the model has no layers'}. Supported "
            f"layers: {', '.join(kind.__name__ for kind in QUANTIZED_CLASSES)}."
        )
    return ModelPlan(tuple(layers), skipped)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that owns parameters."""
    for name, module in model.named_modules():
        if _has_own_parameters(module) or parametrize.is_parametrized(module):
            yield name, module


def _has_own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _plan_layer(
    name: str, module: nn.Module, config: QATConfig, rule: LayerRule | None
) -> LayerPlan:
    weight = config.weight
    activation = config.activation
    if rule is not None:
        weight = rule.weight or weight
        activation = None if rule.weight_only else rule.activation or activation
    if isinstance(module, nn.Embedding):
        activation = None  # its input is indices
    return LayerPlan(name, weight, activation)


def _reason_against(
    model: nn.Module, name: str, module: nn.Module, rule: LayerRule | None
) -> str | None:
    if rule is not None and rule.skip:
        return f"skipped by {rule}"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    kind = type(module)
    if kind not in QUANTIZED_CLASSES:
        supported = next((base for base in QUANTIZED_CLASSES if isinstance(module, base)), None)
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "MultiheadAttention uses its weight without calling it"
        if supported is not None:
            return f"{kind.__name__} is a subclass of {supported.__name__} with its own behaviour"
        return f"{kind.__name__} has no quantized form"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "Embedding with max_norm changes its weight in forward"
        if module.sparse:
            return "Embedding with sparse=True has no sparse gradient through fake quantization"
    if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
        return "it is lazy: run one forward pass before preparing"
    return None


def _refuse_prepared(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise ConfigError(
                f"layer '{name}' is quantization-aware already; close the manager that prepared "
                "this model before preparing it again."
            )


def _check_rules(rules: Sequence[LayerRule], model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for rule in rules:
        if any(_matches(rule, name, module) for name, module in modules.items()):
            continue
        if rule.layer is not None:
            valid = [name for name, module in _candidates(model) if name]
            raise ConfigError(f"{rule} matches no layer; {suggest(rule.layer, valid)}")
        classes = {type(module).__name__ for module in modules.values()}
        raise ConfigError(f"{rule} matches no layer; {suggest(rule.module_class or '', classes)}")


def _last_match(rules: Sequence[LayerRule], name: str, module: nn.Module) -> LayerRule | None:
    matching = [rule for rule in rules if _matches(rule, name, module)]
    return matching[-1] if matching else None


def _matches(rule: LayerRule, name: str, module: nn.Module) -> bool:
    if rule.layer is not None:
        return name == rule.layer or fnmatchcase(name, rule.layer)
    return any(base.__name__ == rule.module_class for base in type(module).__mro__)
