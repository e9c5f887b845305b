"""The parity check finds what differs, names it, and is not misled."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import Plugin, hookimpl, prepare_compression
from compression_manager.deploy import Parity, check_parity
from compression_manager.deploy.conversion import Replacement
from compression_manager.errors import ConfigError, ParityError
from compression_manager.plugin import PluginConfig
from compression_manager.quantization import QuantizationScheme
from compression_manager.training.schedule import StartAt
from compression_plugins.fake_quant import QATConfig
from quantization_reference import prepared, trained

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]


def conversion(model, inputs):
    torch.manual_seed(0)
    manager = trained(model, inputs)
    manager.convert()
    return manager._conversion, model.eval()


def sabotage_integer(layer):
    layer.integer_weight().view(-1)[0] += 60


def sabotage_scale(layer):
    layer.weight_scale.mul_(1.01)


def sabotage_input_scale(layer):
    layer.input_scale.mul_(1.5)


def sabotage_zero_point(layer):
    layer.input_zero_point.fill_(250)


def sabotage_bias(layer):
    layer.bias.add_(0.1)


def sabotage_with_nan(layer):
    layer.bias.fill_(float("nan"))


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc"])
@pytest.mark.parametrize(
    "damage",
    [
        sabotage_integer,
        sabotage_scale,
        sabotage_input_scale,
        sabotage_zero_point,
        sabotage_bias,
        sabotage_with_nan,
    ],
)
def test_a_layer_that_differs_is_named(name, damage):
    torch.manual_seed(0)
    converted, model = conversion(toys.ConvNet(), IMAGES)
    damage(converted.model.get_submodule(name))
    with pytest.raises(ParityError, match=f"layer '{name}' computes something else"):
        check_parity(model, converted.model, converted.replacements, IMAGES)


def test_one_integer_of_many_is_missed_by_no_tolerance():
    """Beside 512 * 9 others in each sum, and a BatchNorm in the scale, it hardly shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(512, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
    nn.init.uniform_(model[1].weight, -1.0, 1.0)
    nn.init.zeros_(model[1].weight[:2])  # whose channels are stored as zeros
    nn.init.constant_(model[1].weight[5], -0.1)
    images = torch.randn(4, 512, 4, 4)
    converted, model = conversion(model, images)
    (replacement,) = converted.replacements
    assert replacement.absorbed == ("1",)
    replacement.layer.integer_weight()[5, 7, 1, 1] += 1
    with pytest.raises(ParityError, match=r"layer '0' stores other integers .*: 1 of 73728"):
        check_parity(model, converted.model, converted.replacements, images)


def test_integers_that_the_example_does_not_use_are_compared_too():
    converted, model = conversion(toys.mlp(), VECTORS)
    converted.model[0].integer_weight()[2].neg_()
    untrained = Replacement("1", nn.ReLU())
    with pytest.raises(ParityError, match=r"layer '0' stores other integers .*: 6 of "):
        check_parity(
            model,
            converted.model,
            [untrained, *converted.replacements],
            torch.zeros_like(VECTORS),
        )


def test_a_part_that_stores_other_integers_is_named():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, input):
            return self.attention(input, input, input)[0]

    inputs = VECTORS.reshape(4, 8, 6)
    converted, model = conversion(Attending(), inputs)
    converted.model.attention.get_submodule("key").integer_weight()[0, 0] += 1
    with pytest.raises(ParityError, match=r"layer 'attention' \('key'\) stores .*: 1 of 36"):
        check_parity(model, converted.model, converted.replacements, torch.zeros_like(inputs))


def test_what_a_model_counts_does_not_count_the_check():
    class Counting(nn.Sequential):
        def forward(self, input):
            self.calls += 1
            return super().forward(input)

    model = Counting(nn.Linear(6, 4))
    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    manager = trained(model, VECTORS, steps=3)
    converted = manager.convert(VECTORS)
    assert converted.calls == model.calls == 3
    check_parity(model.eval(), converted, manager._conversion.replacements, VECTORS)
    assert converted.calls == model.calls == 3


class ReadsWeight(nn.Module):
    """Weights tied by hand: what a tied layer would compute, without quantization."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, input):
        hidden = self.layer(self.embedding(input)).relu().mean(1)
        return F.linear(hidden, self.embedding.weight.to(hidden.dtype))


TOKENS = torch.arange(40).reshape(4, 10)


def test_a_weight_that_the_model_s_own_code_reads_is_named():
    manager = trained(ReadsWeight(), TOKENS)
    with pytest.warns(UserWarning, match="reads the weight of 'embedding', which") as caught:
        manager.convert()
    assert caught[0].filename == __file__
    assert "reads the weight of 'embedding'" in str(manager.report())


def test_a_read_weight_is_named_where_outputs_differ_too_much():
    weight = QuantizationScheme(bits=3, granularity="channel")
    manager = trained(ReadsWeight(), TOKENS, weight=weight)
    with pytest.raises(ParityError, match=r"agrees: the model's own code reads .*'embedding'"):
        manager.convert()


@pytest.mark.filterwarnings("error")
def test_weights_that_are_asked_for_their_dtype_alone_are_not_read():
    class AsksDtype(nn.Sequential):
        def forward(self, input):
            return super().forward(input.to(self[0].weight.dtype))

    manager = trained(AsksDtype(nn.Linear(6, 4)), VECTORS)
    manager.convert()
    assert manager.report().parity.read_weights == ()


def test_the_first_of_several_in_the_order_of_execution_is_named():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 4)
            self.first = nn.Linear(6, 6)

        def forward(self, input):
            return self.last(self.first(input))

    converted, model = conversion(Reversed(), VECTORS)
    for name in ("first", "last"):
        sabotage_bias(converted.model.get_submodule(name))
    with pytest.raises(ParityError, match="layer 'first'"):
        check_parity(model, converted.model, converted.replacements, VECTORS)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_difference_outside_of_the_layers_is_found(factor):
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    converted, model = conversion(model, VECTORS)
    with torch.no_grad():
        converted.model[1].weight.mul_(factor)
    with pytest.raises(ParityError, match="outside of its layers"):
        check_parity(model, converted.model, converted.replacements, VECTORS)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


def test_outputs_in_a_dataclass_are_compared():
    class Wrapped(nn.Sequential):
        def forward(self, input):
            return Output(super().forward(input))

    model = Wrapped(nn.Linear(6, 4), nn.LayerNorm(4))
    manager = prepared(model, fake_quantize_at=StartAt(step=0))
    manager.on_step_begin(0)
    model(VECTORS)
    manager.convert(VECTORS)
    converted = manager._conversion
    with torch.no_grad():
        converted.model[1].weight.mul_(1.1)
    with pytest.raises(ParityError, match="outside of its layers"):
        check_parity(model.eval(), converted.model, converted.replacements, VECTORS)


def test_an_output_of_another_shape_is_found():
    converted, model = conversion(toys.mlp(), VECTORS)
    other = nn.Sequential(converted.model, nn.Flatten(0))
    with pytest.raises(ParityError, match="differs from the trained model's by inf"):
        check_parity(model, other, converted.replacements, VECTORS)


def test_layers_that_the_input_does_not_reach_are_absent():
    converted, model = conversion(toys.mlp(), VECTORS)
    unused = Replacement("unused", converted.replacements[0].layer)
    model.unused = nn.Linear(6, 4)
    model.forward = lambda input: model[2](model[1](model[0](input)))
    parity = check_parity(model, converted.model, [*converted.replacements, unused], VECTORS)
    assert isinstance(parity, Parity)
    assert set(parity.layer_errors) == {"0", "2"}
    assert parity.worst_layer in {"0", "2"}


def test_masked_outputs_and_random_models_are_compared_fairly():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, input):
            noise = torch.rand(input.shape[0], 4)
            scores = (self.linear(input) + noise).masked_fill(noise < 0.3, float("-inf"))
            return scores, scores.argmax(1), F.softmax(torch.full_like(scores, -torch.inf), 1)

    torch.manual_seed(0)
    model = Masked()
    manager = prepared(model, fake_quantize_at=StartAt(step=0))
    manager.on_step_begin(0)
    model(VECTORS)
    manager.convert(VECTORS)
    assert manager._conversion.parity.output_error < 1e-6


def test_code_that_uses_a_quantized_weight_itself_is_explained():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.RNN(6, 6)

        def forward(self, input):
            return F.linear(self.memory(input)[0], self.memory.weight_ih_l0)

    manager = prepared(Direct(), [VECTORS] * 2)
    with pytest.raises(ParityError, match=r"uses the weight .* LayerRule\(layer=\.\.\., skip=True"):
        manager.convert()


def test_inputs_that_the_model_does_not_take_are_explained():
    manager = prepared(toys.mlp(), [VECTORS] * 2)
    with pytest.raises(ConfigError, match="cannot be called with the example inputs") as caught:
        manager.convert({"wrong": VECTORS})
    assert "TypeError" in str(caught.value)


class Factor(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, input):
        return input * self.factor


def test_sums_on_a_rounding_threshold_may_fall_on_either_side():
    """Every second of these integers lies in the middle between two of 256 steps over 0 to 102."""
    trained, sums = nn.Sequential(Factor(1.0)), torch.arange(103.0).repeat(9)
    other_order, other_value = (nn.Sequential(Factor(1 + much)) for much in (2.4e-7, 5e-6))
    parity = check_parity(trained, other_order, [Replacement("0", other_order[0])], sums)
    assert 0 < parity.layer_errors["0"] < 1e-6
    assert parity.layer_steps["0"] == 0
    with pytest.raises(ParityError, match=r"layer '0'.*up to 1 steps of 8 bits away"):
        check_parity(trained, other_value, [Replacement("0", other_value[0])], sums)


class Shifting(nn.Module):
    """Adds to what lies two fifths from the beginning."""

    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, input):
        output = input.clone()
        output[len(input) * 2 // 5] += self.amount
        return output


@pytest.mark.parametrize("count", [101, 10_001])
def test_one_of_all_elements_may_lie_a_step_away_and_no_more(count):
    """Far from zero, a difference that is small as a share of the values is many steps."""
    trained, near, far = (nn.Sequential(Shifting(amount)) for amount in (0.0, 0.004, 0.05))
    sums = 1000 + torch.linspace(0, 1, count)
    parity = check_parity(trained, near, [Replacement("0", near[0])], sums)
    assert parity.layer_steps["0"] == pytest.approx(1 / count)
    with pytest.raises(ParityError, match=r"layer '0'.* lies up to 13 steps of 8 bits away"):
        check_parity(trained, far, [Replacement("0", far[0])], sums)


def test_all_outputs_of_a_layer_are_compared():
    class Both(Shifting):
        def forward(self, input):
            return super().forward(input), input

    trained, same, near, far = (nn.Sequential(Both(by)) for by in (0.0, 0.0, 0.004, 0.05))
    sums = 1000 + torch.linspace(0, 1, 101)
    parity = check_parity(trained, near, [Replacement("0", near[0])], sums)
    assert parity.layer_steps["0"] == pytest.approx(1 / 202)
    assert parity.exact_layers == ()
    with pytest.raises(ParityError, match=r"layer '0'.* lies up to 13 steps of 8 bits away"):
        check_parity(trained, far, [Replacement("0", far[0])], sums)
    parity = check_parity(trained, same, [Replacement("0", same[0])], sums)
    assert parity.exact_layers == ("0",)


def test_narrow_types_may_differ_by_a_few_of_their_own_digits():
    """By up to four epsilons of 2^-7 in bfloat16, which are eight steps of 8 bits."""
    trained, near, far = (nn.Sequential(Factor(factor)) for factor in (1.0, 1.02, 1.05))
    values = torch.linspace(0, 1, 101, dtype=torch.bfloat16)
    parity = check_parity(trained, near, [Replacement("0", near[0])], values)
    assert 2.0**-7 < parity.layer_errors["0"] < 4 * 2.0**-7
    with pytest.raises(ParityError, match=r"layer '0'.* relative error .*, allowed 0\.031"):
        check_parity(trained, far, [Replacement("0", far[0])], values)


def test_classes_that_follow_from_close_logits_are_not_compared():
    class Chosen(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, input):
            return {"logits": input, "chosen": torch.full((len(input),), self.number)}

    assert check_parity(Chosen(1), Chosen(3), [], VECTORS).output_error == 0


def test_products_of_the_same_integers_have_to_be_equal():
    torch.manual_seed(0)
    manager = trained(toys.mlp(), VECTORS, forward="integer")
    converted = manager.convert()
    parity = manager.report().parity
    assert set(parity.exact_layers) == {"0", "2"}
    converted[2].bias.mul_(1 + 1e-6)
    conversion = manager._conversion
    with pytest.raises(ParityError, match=r"layer '2' .* both multiply the same integers"):
        check_parity(manager.model.eval(), conversion.model, conversion.replacements, VECTORS)


class SabotageConfig(PluginConfig):
    plugin = "sabotage"


class Sabotage(Plugin[SabotageConfig]):
    config_class = SabotageConfig

    @hookimpl
    def convert_model(self, conversion):
        sabotage_scale(conversion.model.get_submodule("conv2"))


def test_convert_runs_the_check():
    torch.manual_seed(0)
    manager = prepare_compression(toys.ConvNet(), [QATConfig(), Sabotage(SabotageConfig())])
    toys.train(
        manager,
        toys.loader(toys.images()),
        torch.optim.SGD(manager.model.parameters(), 0.01),
        1,
    )
    with pytest.raises(ParityError, match="layer 'conv2'"):
        manager.convert()


def test_convolutions_are_compared_in_full_precision():
    """cuDNN rounds to TF32 by default, in which a folded BatchNorm computes something else."""
    manager, cudnn, seen = trained(toys.ConvNet(), IMAGES), torch.backends.cudnn, []

    def look(module, args):
        seen.append((cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision))

    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32
    manager.model.fc.register_forward_pre_hook(look)
    manager.convert()
    assert seen
    assert set(seen) == {("ieee", "ieee")}
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32) == before
