"""Services: the first plugin with an answer decides, site by site."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import toys
from compression_manager import ConfigError, PluginError, prepare_compression
from compression_manager.quantization import QuantizationScheme, QuantizationSite
from compression_manager.quantization.observers import MinMaxObserver, RangeObserver
from compression_plugins import QATConfig
from probes import probe

SITE = QuantizationSite("0", "weight")


class OwnObserver(MinMaxObserver):
    """Stands for a third party's."""


def _answers_for_layer_0() -> Any:
    def make_observer(self: Any, scheme: Any, site: Any) -> OwnObserver | None:
        return OwnObserver(scheme, site) if site.layer == "0" else None

    return probe("partial", make_observer=make_observer)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_partial_answer_is_completed_by_the_default_provider(order: tuple[int, ...]) -> None:
    configs = [QATConfig(), _answers_for_layer_0(), probe("bystander")]
    model = toys.mlp()
    manager = prepare_compression(model, [configs[index] for index in order])
    for layer, is_own in ((model[0], True), (model[2], False)):
        for quantizer in layer.quantizers():
            assert isinstance(quantizer.observer, RangeObserver)
            assert isinstance(quantizer.observer, OwnObserver) == is_own
    manager.close()


@pytest.mark.parametrize("order", [1, -1])
def test_own_fake_quantizer_goes_before_the_built_in_one(order: int) -> None:
    asked: list[str] = []

    def make_fake_quantizer(self: Any, site: Any) -> None:
        asked.append(str(site))

    configs = [QATConfig(), probe(make_fake_quantizer=make_fake_quantizer)][::order]
    prepare_compression(toys.mlp(), configs)
    assert sorted(asked) == sorted(
        f"{role} of layer '{layer}'" for role in ("weight", "activation") for layer in "02"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_in_the_list_wins(order: int) -> None:
    def answering(name: str) -> Any:
        return probe(name, make_distillation_loss=lambda self: lambda student, teacher: name)

    names = ["a", "b"][::order]
    manager = prepare_compression(toys.mlp(), [answering(name) for name in names])
    loss: Any = manager._context.services.make_distillation_loss("x", {})
    assert loss(None, None) == names[0]


@pytest.mark.parametrize(
    ("service", "purpose"),
    [
        ("make_observer", "the weight of layer '0'"),
        ("make_fake_quantizer", "the weight of layer '0'"),
        ("make_distillation_loss", "the loss 'mine'"),
    ],
)
@pytest.mark.parametrize("answer", [None, 3])
def test_no_answer_and_a_wrong_one(service: str, purpose: str, answer: Any) -> None:
    plugin = probe("culprit", **{service: lambda self: answer})
    services = prepare_compression(toys.mlp(), [plugin])._context.services
    is_loss = service == "make_distillation_loss"
    arguments: Any = ("mine", {}) if is_loss else (QuantizationScheme(), SITE)
    expected = ConfigError if answer is None else PluginError
    with pytest.raises(expected) as error:
        getattr(services, service)(*arguments)
    if answer is None:
        assert f"no plugin answers {service} for {purpose}" in str(error.value)
    else:
        assert error.value.plugin == "culprit"  # type: ignore[attr-defined]
        assert f"must answer '{service}' with None or an object of type " in str(error.value)
