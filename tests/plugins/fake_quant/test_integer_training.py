"""Training on integers: together with what users put around their models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compression_manager import ConfigError, prepare_compression
from compression_manager.quantization.integer import products, torch_passes
from compression_manager.quantization.integer.cpu_features import CpuFeatures
from compression_manager.quantization.integer.products import linear_kernel
from compression_manager.quantization.integer.selection import TORCH, active_passes, use_passes
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.quantization.layers.decisions import last_decision
from compression_manager.quantization.layers.relu import BitMaskReLU
from compression_plugins import QATConfig
from integer_layers import pretended
from quantization_reference import prepared, step, trained

FORWARD = ("auto", "integer")

INTEGERS = "products of integers with 32-bit sums"


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 3 * 3, 5),
    )  # fmt: skip


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def volumes_and_series() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(2, 3), nn.Flatten(2, 3),
        nn.Conv1d(6, 5, 4, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 21, 5),
    )  # fmt: skip


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SEQUENCES = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "cnn": (cnn, IMAGES),
    "channels_last": (
        lambda: cnn().to(memory_format=torch.channels_last),
        IMAGES.contiguous(memory_format=torch.channels_last),
    ),
    "encoder": (encoder, SEQUENCES),
    "one and three axes": (volumes_and_series, IMAGES.unflatten(2, (2, 4))),
}


def paths(model: nn.Module) -> set[str]:
    found = set()
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            for part in layer.parts().values():
                decision = last_decision(part)
                found.add("none" if decision is None else decision.path)
    return found


def gradients(model: nn.Module) -> list[Tensor]:
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("name", MODELS)
def test_training_follows_fake_quantization_to_the_last_bit_without_integer_kernels(
    name: str,
) -> None:
    build, inputs = MODELS[name]
    with torch.random.fork_rng():
        fake = trained(build(), inputs, forward="fake", steps=4)
        lean = trained(build(), inputs, forward="auto", steps=4)
    if "integer" in paths(lean.model):
        pytest.skip("this machine multiplies integers, which rounds otherwise")
    assert paths(lean.model) == {"codes"}
    assert paths(fake.model) == {"none"}
    for (key, value), other in zip(
        fake.model.state_dict().items(), lean.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", MODELS)
def test_integers_of_the_converted_model_are_those_of_training(name: str) -> None:
    build, inputs = MODELS[name]
    manager = trained(build(), inputs, forward="integer")
    assert paths(manager.model) == {"integer"}
    converted = manager.convert(inputs)
    manager.model.eval()
    with torch.no_grad():
        assert torch.equal(converted(inputs), manager.model(inputs))


@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients_and_ranges(
    use_reentrant: bool, forward: str
) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return checkpoint(super().forward, input, use_reentrant=use_reentrant)

    inputs = IMAGES.clone().requires_grad_()
    results = []
    for kind in (nn.Sequential, Checkpointed):
        model = kind(*cnn().children())
        manager = prepared(model, [inputs, inputs * 1.5, inputs * 2.0], forward=forward)
        results.append((gradients(model), manager.model.state_dict()))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    for key, value in results[0][1].items():
        assert torch.equal(value, results[1][1][key]), key


@pytest.mark.parametrize("forward", FORWARD)
def test_autocast_takes_fake_quantization_in_its_own_type(forward: str) -> None:
    model = encoder()
    manager = prepared(model, [SEQUENCES] * 2, forward=forward)
    with torch.autocast("cpu", torch.bfloat16):
        output = step(manager, SEQUENCES, 2)
    assert paths(model) == {"fake"}
    assert output.isfinite().all()


@pytest.mark.parametrize("forward", FORWARD)
def test_accumulated_gradients_are_the_sum_of_those_of_the_parts(forward: str) -> None:
    # A frozen range, so that both ways quantize alike.
    manager = prepared(cnn(), [IMAGES] * 3, forward=forward)
    model = manager.model
    model.eval()
    model.zero_grad()
    for part in IMAGES.split(2):
        model(part).square().sum().backward()
    together = gradients(model)
    model.zero_grad()
    alone = []
    for part in IMAGES.split(2):
        model.zero_grad()
        model(part).square().sum().backward()
        alone.append(gradients(model))
    for total, first, second in zip(together, *alone, strict=True):
        assert torch.allclose(total, first + second, rtol=0, atol=1e-5 * float(total.abs().max()))


def test_copies_train_on_their_own() -> None:
    manager = prepared(cnn(), [IMAGES] * 2)
    twin = copy.deepcopy(manager.model)
    before = manager.model.eval()(IMAGES)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    assert not torch.equal(twin.eval()(IMAGES), before)
    assert torch.equal(manager.model(IMAGES), before)


@pytest.mark.parametrize("forward", FORWARD)
def test_a_single_weight_that_an_optimizer_of_ones_own_writes_counts(forward: str) -> None:
    class OneWeight:
        """None of torch's: leaves no trace in autograd's counter, nor in most of the values."""

        def step(self) -> None:
            manager.model[0].weight.data[3, 5] += 100.0

    torch.manual_seed(0)
    inputs = torch.randn(4, 64)
    manager = prepared(nn.Sequential(nn.Linear(64, 64)), [inputs] * 3, forward=forward)
    manager.on_step_begin(3)
    loss = manager.on_after_compute_loss(inputs, output := manager.model(inputs), output.mean())
    loss.backward()
    manager.on_before_optimizer_step()
    OneWeight().step()
    manager.on_after_optimizer_step()
    manager.on_step_end()
    change = (manager.model(inputs) - output)[:, 3]
    torch.testing.assert_close(change, 100.0 * inputs[:, 5], rtol=0.05, atol=5.0)


def test_relus_keep_bits_as_long_as_the_manager_lives() -> None:
    model = cnn()
    manager = prepare_compression(model, [QATConfig()])
    assert [type(module) for module in model if isinstance(module, nn.ReLU)] == [BitMaskReLU] * 2
    manager.close()
    assert [type(module) for module in model if isinstance(module, nn.ReLU)] == [nn.ReLU] * 2


@pytest.mark.parametrize("name", MODELS)
def test_closing_leaves_no_attribute_in_any_module(name: str) -> None:
    model = MODELS[name][0]()
    before = {key: set(vars(module)) for key, module in model.named_modules()}
    prepare_compression(model, [QATConfig(forward="fake")]).close()
    assert {key: set(vars(module)) for key, module in model.named_modules()} == before


def test_fake_forward_leaves_relus_alone() -> None:
    model = cnn()
    prepare_compression(model, [QATConfig(forward="fake")])
    assert not any(isinstance(module, BitMaskReLU) for module in model.modules())


def test_converted_models_hold_plain_relus() -> None:
    manager = trained(cnn(), IMAGES)
    converted = manager.convert()
    assert not any(isinstance(module, BitMaskReLU) for module in converted.modules())


@pytest.mark.parametrize("option", ["forward", "backward"])
def test_unknown_arithmetic_is_refused_with_the_nearest(option: str) -> None:
    value: Any = {"forward": "integr", "backward": "bfloat16x2"}[option]
    with pytest.raises(ConfigError, match="integer" if option == "forward" else "bfloat16x3"):
        QATConfig(**{option: value})


def test_the_report_says_why_there_are_no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSION_MANAGER_NATIVE", "0")
    manager = prepare_compression(cnn(), [QATConfig()])
    assert "COMPRESSION_MANAGER_NATIVE=0" in manager.report().notes["qat"]
    manager.close()
    monkeypatch.setenv("COMPRESSION_MANAGER_NATIVE", "yes")
    with pytest.raises(ConfigError, match="valid are 0"):
        prepare_compression(cnn(), [QATConfig()])


def test_the_report_says_who_computes_on_what_and_why() -> None:
    manager = trained(cnn(), IMAGES)
    arithmetic = {layer.name: layer.arithmetic for layer in manager.report().layers}
    assert all(arithmetic[name] for name in ("0", "2", "5"))
    model = encoder()
    skipped = prepared(model, [SEQUENCES] * 2, forward="integer")
    with torch.autocast("cpu", torch.bfloat16):
        step(skipped, SEQUENCES, 2)
    report = skipped.report()
    described = [layer.arithmetic for layer in report.layers if layer.arithmetic is not None]
    assert len(described) == sum(layer.quantized for layer in report.layers)
    # The report itself runs the model in evaluation, without autocast.
    kernel = linear_kernel(torch.device("cpu"), active_passes(), packs=False)
    reasons = ("autocast chooses the type of the products", "it computes in torch.bfloat16")
    fake = "float32 products of fake-quantized operands"
    assert {(item.training, item.evaluation) for item in described} == {(fake, INTEGERS)}
    assert all(set(item.reasons) <= set(reasons) and item.reasons for item in described)
    assert all(item.kernel.startswith(kernel) for item in described)
    lines = str(report).splitlines()
    assert any(line.startswith(f"{fake}; in evaluation {INTEGERS}: ") for line in lines)
    assert any(line.startswith(f"  {reasons[0]}") for line in lines)
    assert any(line.startswith(f"products of integers by {kernel}") for line in lines)


def test_the_report_says_how_transposed_convolutions_compute() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    report = trained(model, torch.randn(2, 3, 8, 8)).report()
    (transposed,) = (layer.arithmetic for layer in report.layers if layer.name == "1")
    assert transposed is not None
    assert transposed.reasons == ["transposed convolutions have no product of integers"]
    assert "1" in str(report).split("fake-quantized operands: ")[1].splitlines()[0]


def test_the_report_says_why_training_is_not_on_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_passes(TORCH), pretended(monkeypatch, vnni=False, amx=False):
        layers = trained(cnn(), IMAGES).report().layers
    told = [layer.arithmetic for layer in layers if layer.arithmetic is not None]
    reason = "the torch kernels need VNNI to gain; this CPU has neither VNNI nor AMX"
    assert told
    assert all("kept for the backward pass" in item.training for item in told)
    assert all(item.reasons == [reason] and item.evaluation == INTEGERS for item in told)


@pytest.mark.parametrize("vnni", [False, True])
def test_the_report_names_the_kernels(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = trained(volumes_and_series(), MODELS["one and three axes"][1], forward="integer")
    features = CpuFeatures(vnni=vnni, amx=False)
    for module in (products, torch_passes):
        monkeypatch.setattr(module, "cpu_features", lambda: features)
    with use_passes(TORCH):
        layers = manager.report().layers
    described = [layer.arithmetic.kernel for layer in layers if layer.arithmetic is not None]
    convolutions, linear = described[:2], described[2]
    assert all(("onednn.qconv_pointwise" in item) == vnni for item in convolutions)
    assert ("torch._int_mm" in linear and "once converted by onednn.qlinear" in linear) == vnni
    assert all("float32 products, summed exactly" in item for item in described) != vnni


def test_integer_kernels_slower_than_float_are_named() -> None:
    from compression_manager.report import LayerReport, Report

    rows = (
        LayerReport("a", "Linear", True, "", 4, 1, 40.0, None, 2.5),
        LayerReport("b", "Linear", True, "", 4, 1, 40.0, None, 0.5),
        LayerReport("c", "Linear", True, "", 4, 1, 40.0, None, 1.05),
        LayerReport("d", "Linear", True, "", 4, 1, 40.0, None, 1.2),
    )
    found = "slower on integers than in float32 here, at most 2.5 times its time: a, d"
    assert found in str(Report(rows)).splitlines()


def test_resuming_with_other_arithmetic_warns() -> None:
    manager = prepared(cnn(), [IMAGES] * 2, forward="auto")
    manager.on_epoch_end()
    state = copy.deepcopy(manager.state_dict())
    manager.close()
    other = prepare_compression(cnn(), [QATConfig(forward="fake")])
    with pytest.warns(UserWarning, match="rounds otherwise"):
        other.load_state_dict(state)


def test_gradients_in_a_converted_model_are_those_of_float_products() -> None:
    manager = trained(cnn(), IMAGES, forward="integer")
    converted = manager.convert(IMAGES)
    leaf = IMAGES.clone().requires_grad_()
    converted(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def test_loaded_buffers_count_in_a_converted_model() -> None:
    first = trained(cnn(), IMAGES, forward="integer").convert(IMAGES)
    second = trained(cnn(), IMAGES * 2.0, forward="integer", steps=5).convert(IMAGES)
    expected = second(IMAGES)
    first(IMAGES)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(IMAGES), expected)


def test_a_model_converted_in_inference_mode_runs() -> None:
    manager = trained(cnn(), IMAGES, forward="integer")
    expected = manager.convert(IMAGES)(IMAGES)
    with torch.inference_mode():
        converted = manager.convert(IMAGES)
        assert torch.equal(converted(IMAGES), expected)
