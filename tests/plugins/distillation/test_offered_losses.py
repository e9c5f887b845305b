"""Losses that other plugins offer: what they are given, when they are asked, who is blamed."""

import warnings

import pytest

import toys
from compression_manager import ConfigError, Plugin, PluginError, hookimpl, prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    LinearSchedule,
)
from probes import ProbeConfig, probe
from toy_teachers import begin

INPUTS = toys.vectors(8).tensors[0]


def offering(function, name="own"):
    def make_distillation_loss(self, name):
        return function if name == "own" else None

    return probe(name, make_distillation_loss=make_distillation_loss)


def step(criterion, plugin):
    manager = begin(
        prepare_compression(toys.mlp(), [DistillationConfig(toys.mlp(), criterion), plugin])
    )
    output = manager.model(INPUTS)
    return manager.on_after_compute_loss(INPUTS, output, output.sum() * 0.0)


def by_items(student, teacher, num_items):
    return (student - teacher).square().sum() / num_items


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("function", [lambda student, teacher: student.mean(), by_items])
def test_a_loop_that_counts_items_for_terms_that_are_means_is_told_once(function, accumulates):
    criterion = KnowledgeDistillationLossConfig(loss_types=("CE", "own"))
    listed = [DistillationConfig(toys.mlp(), criterion), offering(function)]
    manager = begin(prepare_compression(toys.mlp(), listed))
    with warnings.catch_warnings(record=True, action="always") as caught:
        for count in (None, 32, 32, 32):
            output = manager.model(INPUTS)
            if count is None and function is by_items:
                continue
            loss = manager.on_after_compute_loss(INPUTS, output, output.sum(), num_items=count)
            loss.backward()
            if not accumulates:
                manager.on_before_optimizer_step()
                manager.on_after_optimizer_step()
    told = ["means over the batch" in str(item.message) for item in caught]
    assert told == ([True] if accumulates and function is not by_items else [])


@pytest.mark.parametrize("temperature", [4, LinearSchedule(4.0, 2.0, 10)])
@pytest.mark.parametrize(
    "criterion",
    [
        lambda temperature: KnowledgeDistillationLossConfig(temperature, ("CE", "own")),
        lambda temperature: IntermediateLayersKnowledgeDistillationLossConfig(
            ["2"], "own", temperature=temperature
        ),
    ],
)
def test_a_loss_that_names_the_temperature_is_given_it(criterion, temperature):
    seen = []

    def own(student, teacher, temperature):
        seen.append(temperature)
        return (student - teacher).square().mean()

    step(criterion(temperature), offering(own))
    assert seen == [4]


@pytest.mark.parametrize(
    "criterion",
    [
        KnowledgeDistillationLossConfig(loss_types=("CE", "own")),
        IntermediateLayersKnowledgeDistillationLossConfig(["2"], "own"),
    ],
)
def test_a_loss_is_not_called_with_example_inputs_for_it_may_keep_what_it_sees(criterion):
    seen = []

    def own(student, teacher):
        seen.append(student)
        return (student - teacher).square().mean()

    listed = [DistillationConfig(toys.mlp(), criterion), offering(own)]
    manager = begin(prepare_compression(toys.mlp(), listed, example_inputs=INPUTS))
    assert not seen
    output = manager.model(INPUTS)
    manager.on_after_compute_loss(INPUTS, output, output.sum() * 0.0)
    assert len(seen) == 1


@pytest.mark.parametrize("error", [TypeError("own fault"), ConfigError("own fault")])
def test_what_a_loss_raises_names_the_plugin_that_offers_it(error):
    def own(student, teacher):
        raise error

    with pytest.raises((PluginError, ConfigError), match="own fault") as found:
        step(KnowledgeDistillationLossConfig(loss_types=("CE", "own")), offering(own, "culprit"))
    if isinstance(error, ConfigError):
        note = "raised by plugin 'culprit' in hook 'make_distillation_loss'"
        assert found.value.__notes__ == [note]
    else:
        assert found.value.plugin == "culprit"
        assert "plugin 'culprit' failed in hook 'make_distillation_loss'" in str(found.value)
        assert found.value.__cause__ is error
    assert str(found.value).startswith("distillation.criterion")


class Last(Plugin[ProbeConfig]):
    config_class = ProbeConfig

    @hookimpl(trylast=True)
    def make_distillation_loss(self, name):
        return lambda student, teacher: (student - teacher).square().mean()


@pytest.mark.parametrize("order", [1, -1])
def test_a_plugin_that_is_asked_last_offers_what_nobody_else_does(order):
    criterion = KnowledgeDistillationLossConfig(loss_types=("CE", "own"))
    plugins = [DistillationConfig(toys.mlp(), criterion), Last(ProbeConfig())][::order]
    prepare_compression(toys.mlp(), plugins).close()


@pytest.mark.parametrize(
    ("criterion", "offered"),
    [
        (KnowledgeDistillationLossConfig(loss_types=("CE", "KLD")), False),
        (IntermediateLayersKnowledgeDistillationLossConfig(["2"], "KLD"), True),
    ],
)
def test_the_error_of_an_unknown_name_offers_what_can_work(criterion, offered):
    with pytest.raises(ConfigError, match=r"loss 'KLD'; did you mean 'KL'.*rkd_angle") as error:
        prepare_compression(toys.mlp(), [DistillationConfig(toys.mlp(), criterion)])
    assert ("attention_transfer" in str(error.value)) == offered
