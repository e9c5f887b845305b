"""Conversion: the converted model is free of the plugin and can be stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from compression_manager import deploy
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.errors import CompressionError
from compression_manager.models.calling import call_model
from compression_manager.plugin import PluginConfig
from compression_manager.plugin_host.discovery import load_plugin_class
from compression_manager.testing.comparison import differences
from compression_manager.testing.contract.base import ContractRuns, Run, require, require_none

_QUANTIZER = "qat"
"""Plugin that quantizes where none of those listed does."""


class ConversionContract(ContractRuns):
    """Tests of what `convert` returns; a plugin that quantizes nothing stands beside QAT."""

    def test_converted_model_has_no_trace(self) -> None:
        """It consists of plain and deployed layers, and all that a checkpoint holds stays."""
        run = self._trained()
        before = run.state()
        converted = self._convert(run)
        after = run.state()
        require_none(
            _foreign_parts(converted, self.make_model()),
            "the converted model holds parts of the training; change conversion.model in "
            "convert_model so that only plain and deployed layers stay, and place hooks with "
            "context.model_hooks, which do not reach the copy:",
        )
        require(
            not any(module.training for module in converted.modules()),
            "a module of the converted model is in training mode; leave it in eval mode.",
        )
        require_none(
            differences(after, before),
            "convert() changed the training; convert_model may change conversion.model only:",
        )

    def test_converted_model_lives_alone(self) -> None:
        """It computes the same after `close`, after loading its state, and read from disk."""
        run = self._trained()
        inputs = next(iter(run.parts.batches))[0]
        converted, other = self._convert(run), self._convert(run)
        expected = call_model(converted, inputs)
        state = copy.deepcopy(converted.state_dict())
        directory = run.manager.save_converted(self.folder / "converted")
        run.manager.close()
        require_none(
            differences(call_model(converted, inputs), expected, "output"),
            "the converted model computes otherwise once the manager is closed; it must share "
            "nothing with the model that was trained:",
        )
        other.load_state_dict(state)
        require_none(
            differences(call_model(other, inputs), expected, "output"),
            "a converted model with the loaded state_dict of another computes otherwise; keep "
            "what it computes with in parameters and buffers:",
        )
        try:
            stored = deploy.load(directory, self.make_model())
        except CompressionError as error:
            raise AssertionError(
                f"what save_converted wrote cannot be loaded into a new float model: {error}"
            ) from error
        require_none(
            differences(call_model(stored, inputs), expected, "output"),
            "the model that deploy.load read computes otherwise than the converted one:",
        )

    def _trained(self) -> Run:
        parts = self._build("run")
        listed = [*parts.configs]
        if not any("fake_quant" in self._plugin_class(config).roles for config in listed):
            listed.append(_quantizer_config())
        return self._prepare(parts, listed).train()

    def _convert(self, run: Run) -> nn.Module:
        try:
            return run.manager.convert()
        except Exception as error:
            raise AssertionError(
                f"the trained model cannot be converted: {error}\nWhat the plugin adds to layers "
                "must not keep them from being copied and replaced; implement convert_model to "
                "remove it from conversion.model."
            ) from error


def _quantizer_config() -> PluginConfig:
    return load_plugin_class(_QUANTIZER).config_class()


def _foreign_parts(converted: nn.Module, plain: nn.Module) -> list[str]:
    """Return what is neither part of the plain model nor of a deployed layer."""
    own = dict(plain.named_modules())
    found = []
    deployed: list[str] = []
    for name, module in converted.named_modules():
        where = f"module '{name}' ({type(module).__qualname__})"
        if any(name.startswith(f"{other}.") for other in deployed):
            continue
        if isinstance(module, ConvertedLayer):
            deployed.append(name)
        elif name in own and type(module) is type(own[name]):
            found += [f"{where}: {line}" for line in _additions(module, own[name])]
        elif not (name in own and type(module) is nn.Identity):
            found.append(where)
    return found


def _additions(module: nn.Module, plain: nn.Module) -> list[str]:
    """Return attributes, tensors and hooks that the plain module does not have."""
    lines = []
    for key, value in vars(module).items():
        other = vars(plain).get(key)
        if key not in vars(plain):
            lines.append(f"attribute '{key}'")
        elif isinstance(value, Mapping) and isinstance(other, Mapping) and key != "_modules":
            lines += _more(key, value, other)
    return lines


def _more(key: str, value: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[str]:
    if key in ("_parameters", "_buffers"):
        return [f"tensor '{name}'" for name in value if name not in other]
    if "hooks" in key and len(value) > len(other):
        return [f"{len(value) - len(other)} more of '{key}'"]
    return []
