"""The quantization config of Neural Compressor, as one of the plugin for QAT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import compression_plugins as plugins
from compression_manager import StartAt
from compression_manager.errors import ConfigError
from compression_manager.quantization import QuantizationScheme
from compression_plugins.compat.neural_compressor import config as compat

# 2.6's name of all convolutions; the class from which torch derives them.
_CLASSES = {"Conv": "_ConvNd"}
_DTYPES = {"weight": "int8", "activation": "uint8"}


def translate_quantization(
    config: compat.QuantizationAwareTrainingConfig,
) -> tuple[plugins.QATConfig, list[str]]:
    """Return the plugin's config, and a message for everything that has no meaning here.

    Fake quantization begins with the first step, as in 2.6.

    Raises:
        ConfigError: a value is invalid.
    """
    rules: list[plugins.LayerRule] = []
    notes: list[str] = []
    for field in ("op_type_dict", "op_name_dict"):  # the last rule that matches applies
        for name, parts in _entries(config, field).items():
            place = f"QuantizationAwareTrainingConfig.{field}[{name!r}]"
            options = _float_parts(place, parts, notes)
            if options and field == "op_name_dict":
                rules.append(plugins.LayerRule(layer=name, **options))
            elif options:
                rules.append(plugins.LayerRule(module_class=_CLASSES.get(name, name), **options))
    if config.reduce_range not in (None, True, False):
        raise ConfigError(
            "QuantizationAwareTrainingConfig.reduce_range must be None, True or False, got "
            f"{config.reduce_range!r}."
        )
    bits = 7 if config.reduce_range else 8
    translated = plugins.QATConfig(
        activation=QuantizationScheme(bits=bits, symmetric=False, signed=False),
        overrides=tuple(rules),
        fake_quantize_at=StartAt(step=0),
    )
    return translated, notes


def _entries(config: compat.QuantizationAwareTrainingConfig, field: str) -> Mapping[str, Any]:
    entries = getattr(config, field)
    if entries is None:
        return {}
    if isinstance(entries, Mapping) and all(isinstance(item, Mapping) for item in entries.values()):
        return entries
    raise ConfigError(
        f"QuantizationAwareTrainingConfig.{field} must be a dictionary such as "
        f"{{'Linear': {{'weight': {{'dtype': ['fp32']}}}}}}, got {entries!r}."
    )


def _float_parts(place: str, parts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the options of the LayerRule; empty if nothing is to stay in float."""
    in_float = {}
    for part, options in parts.items():
        if part not in _DTYPES or not isinstance(options, Mapping):
            raise ConfigError(
                f"{place} takes 'weight' and 'activation' with a dictionary each, got {parts!r}."
            )
        dtypes = options.get("dtype", [])
        dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
        in_float[part] = dtypes == ["fp32"]
        if set(options) - {"dtype"} or dtypes not in ([], ["fp32"], [_DTYPES[part]]):
            notes.append(
                f"{place}['{part}']={options!r} has no meaning here and is ignored, except for the "
                "dtype 'fp32': weights are int8 per channel and activations uint8 per tensor, as "
                "they were in 2.6 whatever these dictionaries said."
            )
    if in_float.get("weight"):
        return {"skip": True}
    return {"weight_only": True} if in_float.get("activation") else {}
