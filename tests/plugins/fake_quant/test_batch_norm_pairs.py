"""Finding conv-BatchNorm pairs by observing one forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from compression_manager import StartAt, prepare_compression
from compression_manager.models.calling import call_model
from compression_manager.quantization import QuantizableAdd, QuantizationScheme
from compression_plugins.fake_quant import LayerRule, QATConfig
from quantization_reference import step

INPUT = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """One conv, one BatchNorm, and a body given by the test."""

    def __init__(self, body, batch_norm=None, **convolution):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, **convolution)
        self.bn = batch_norm or nn.BatchNorm2d(4)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.body = body

    def forward(self, input):
        return self.body(self, input)


class Double(torch.autograd.Function):
    """A use that functions of Python do not see."""

    @staticmethod
    def forward(ctx, input):
        return input * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def residual(net, input):
    hidden = net.conv(input)
    return net.bn(hidden) + hidden


def functional_second_use(net, input):
    hidden = net.conv(input)
    return net.bn(hidden) * torch.sigmoid(hidden.mean())


def custom_function_second_use(net, input):
    hidden = net.conv(input)
    return net.bn(hidden) + Double.apply(hidden)


def decision_on_the_output(net, input):
    hidden = net.conv(input)
    output = net.bn(hidden)
    return output * 2 if (hidden > 0).any().item() else output


def item_assignment(net, input):
    hidden = net.conv(input)
    with torch.no_grad():
        hidden[:, 0] = 0.0
    return net.bn(hidden)


def in_place(net, input):
    return net.bn(net.conv(input).add_(1.0))


def returned(net, input):
    hidden = net.conv(input)
    return {"output": net.bn(hidden), "hidden": [hidden]}


def view_returned(net, input):
    hidden = net.conv(input)
    return net.bn(hidden), hidden.flatten(1)


def relu_between(net, input):
    return net.bn(F.relu(net.conv(input)))


def concatenated(net, input):
    return net.bn(torch.cat([net.conv(input), net.other(input)], 2))


def summed(net, input):
    return net.bn(net.conv(input) + net.other(input))


def convolution_twice(net, input):
    return net.bn(net.conv(input)) + net.bn2(net.conv(input))


def batch_norm_twice(net, input):
    return net.bn(net.conv(input)) + net.bn(net.other(input))


def two_readers(net, input):
    hidden = net.conv(input)
    return net.bn(hidden) + net.bn2(hidden)


def functional_batch_norm(net, input):
    hidden = net.conv(input)
    return net.bn(hidden) + F.batch_norm(hidden, net.bn2.running_mean, net.bn2.running_var)


def never_used(net, input):
    return net.other(input)


def plain(net, input):
    return net.bn(net.conv(input))


def keyword(net, input):
    return net.bn(input=net.conv(input=input))


def looked_at(net, input):
    hidden = net.conv(input)
    if hidden.shape[0] > 1 and hidden.dim() == 4 and hidden.is_floating_point():
        assert hidden.size(1) == 4
        assert hidden.device.type == "cpu"
        assert len(hidden) == 2
    return net.bn(hidden)


def in_place_behind(net, input):
    return F.relu_(net.bn(net.conv(input)))


def control_flow(net, input):
    hidden = net.conv(input) if input.sum() > 1e9 else net.other(input)
    return net.bn(hidden)


def checkpointed(net, input):
    return checkpoint(lambda value: net.bn(net.conv(value)), input, use_reentrant=False)


def checkpointed_apart(net, input):
    return net.bn(checkpoint(net.conv, input, use_reentrant=False))


def checkpoint_returns_both(net, input):
    output, hidden = checkpoint(lambda value: (net.bn(value), value), net.conv(input),
                                use_reentrant=False)  # fmt: skip
    return output + hidden


CASES = {
    residual: {},
    functional_second_use: {},
    custom_function_second_use: {},
    decision_on_the_output: {},
    item_assignment: {},
    in_place: {},
    returned: {},
    view_returned: {},
    relu_between: {},
    concatenated: {},
    summed: {},
    convolution_twice: {},
    batch_norm_twice: {},
    two_readers: {},
    functional_batch_norm: {},
    never_used: {},
    checkpoint_returns_both: {},
    plain: {"bn": "conv"},
    keyword: {"bn": "conv"},
    looked_at: {"bn": "conv"},
    in_place_behind: {"bn": "conv"},
    control_flow: {"bn": "other"},
    checkpointed: {"bn": "conv"},
    checkpointed_apart: {"bn": "conv"},
}


def folded(manager):
    return {
        layer.name: layer.detail.split("'")[1]
        for layer in manager.report().layers
        if layer.detail.startswith("folded into")
    }


def score(output):
    if isinstance(output, torch.Tensor):
        return output.square().mean()
    items = output.values() if isinstance(output, dict) else output
    return sum(score(item) for item in items)


def run(model, *, with_inputs=False, training=True, steps=2, **options):
    """Train; return the manager and the pairs that were found before conversion."""
    torch.manual_seed(0)
    model.train(training)
    manager = prepare_compression(
        model, [QATConfig(**options)], example_inputs=INPUT if with_inputs else None
    )
    at_prepare = folded(manager)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(steps):
        step(manager, INPUT, index, criterion=score)
    assert not _get_current_dispatch_mode_stack()
    assert not _get_current_function_mode_stack()
    if with_inputs:
        assert folded(manager) == at_prepare
    return manager


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_only_a_batch_norm_that_is_the_only_consumer_is_folded(body, with_inputs, training):
    model = Net(body)
    manager = run(model, with_inputs=with_inputs, training=training)
    assert folded(manager) == CASES[body]
    assert model.training is training
    # Whatever is folded, the deployed model computes the same (checked by convert as well).
    converted = manager.convert()
    assert folded(manager) == CASES[body]
    identities = {n for n, m in converted.named_modules() if isinstance(m, nn.Identity)}
    assert identities == set(CASES[body])
    with torch.no_grad():
        expected, actual = score(model.eval()(INPUT)), score(converted(INPUT))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_consumer_is_seen():
    @torch.jit.script
    def mean(input: torch.Tensor) -> torch.Tensor:
        return input.mean()

    def body(net, input):
        hidden = net.conv(input)
        return net.bn(hidden) * mean(hidden)

    assert folded(run(Net(body))) == {}


@pytest.mark.parametrize("reads", [True, False])
def test_a_conditional_is_an_operation_that_reads(reads):
    def body(net, input):
        hidden = net.conv(input)
        condition = (input.sum() > 0, torch.sin, torch.cos, (hidden if reads else input[:, :1],))
        return net.bn(hidden) + torch.cond(*condition)

    model = Net(body)
    prepared = prepare_compression(model, [QATConfig()])
    model(INPUT)
    assert folded(prepared) == ({} if reads else {"bn": "conv"})


def test_nested_modules_of_every_dimension():
    class Block(nn.Module):
        def __init__(self, convolution, batch_norm):
            super().__init__()
            self.layers = nn.Sequential(convolution, batch_norm, nn.ReLU(inplace=True))

        def forward(self, input):
            return self.layers(input)

    model = nn.Sequential(
        Block(nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4)), nn.Flatten(2, 3),
        Block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Flatten(2, 3),
        Block(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
    )  # fmt: skip
    manager = prepare_compression(model, [QATConfig()], example_inputs=torch.randn(2, 1, 3, 4, 5))
    assert folded(manager) == {f"{i}.layers.1": f"{i}.layers.0" for i in (0, 2, 4)}


def test_a_batch_norm_with_behaviour_of_its_own_is_not_folded():
    class Activated(nn.BatchNorm2d):
        def forward(self, input):
            return F.relu(super().forward(input))

    model = Net(plain, Activated(4))
    manager = run(model)
    assert folded(manager) == {}
    torch.testing.assert_close(manager.convert()(INPUT), model.eval()(INPUT))


def test_a_user_s_hook_between_the_two_is_a_consumer():
    model = Net(plain)
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    assert folded(run(model)) == {}


def test_an_unbatched_output_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm1d(6))
    manager = prepare_compression(model, [QATConfig()], example_inputs=torch.randn(3, 6, 6))
    assert folded(manager) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"weight": QuantizationScheme()},
        {"weight": QuantizationScheme(granularity="channel", symmetric=False)},
        {"weight": QuantizationScheme(granularity="channel", axis=1)},
        {"overrides": (LayerRule("conv", skip=True),)},
        {"overrides": (LayerRule("conv", weight=QuantizationScheme()),)},
    ],
)
def test_weights_that_folding_would_change_are_not_folded_and_still_right(options):
    model = Net(lambda net, input: net.bn(net.conv(input)) + net.other(input))
    manager = run(model, **options)
    assert folded(manager) == {}
    torch.testing.assert_close(manager.convert()(INPUT), model.eval()(INPUT), rtol=1e-5, atol=1e-5)


def test_without_running_statistics_nothing_is_folded():
    model = Net(plain, nn.BatchNorm2d(4, track_running_stats=False))
    manager = run(model)
    assert folded(manager) == {}
    torch.testing.assert_close(manager.convert()(INPUT), model.eval()(INPUT), rtol=1e-5, atol=1e-5)


# The observation itself -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_raises_is_observed_again(error):
    fails = [True, True, False]

    def body(net, input):
        hidden = net.conv(input)
        if fails.pop(0):
            raise error("from the model")
        return net.bn(hidden)

    model = Net(body)
    manager = prepare_compression(model, [QATConfig()])
    for _ in range(2):
        with pytest.raises(error, match="from the model"):
            model(INPUT)
        assert folded(manager) == {}
        if error is ValueError:
            assert not _get_current_dispatch_mode_stack()
    model(INPUT)
    assert not _get_current_dispatch_mode_stack()
    assert folded(manager) == {"bn": "conv"}


def hooked(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


def test_what_was_observed_is_watched_until_the_manager_closes():
    model = Net(plain)
    manager = prepare_compression(model, [QATConfig()])
    assert hooked(model) == [""]
    model(INPUT)
    assert hooked(model) == ["", "conv", "bn"]
    manager.close()
    assert hooked(model) == []


def test_a_model_without_pairs_is_observed_once():
    model = Net(residual)
    prepare_compression(model, [QATConfig()])
    model(INPUT)
    assert hooked(model) == []


def with_auxiliary_output(net, input):
    hidden = net.conv(input)
    output = net.bn(hidden)
    return (output, hidden.mean((2, 3))) if net.is_auxiliary else output


def second_use_by_flag(net, input):
    hidden = net.conv(input)
    output = net.bn(hidden)
    return output + hidden if net.is_auxiliary else output


class Flagged(Net):
    """Takes a second path by an argument, as Net's bodies may by an attribute."""

    def forward(self, input, is_auxiliary=False):
        self.is_auxiliary = is_auxiliary
        return super().forward(input)


@pytest.mark.parametrize("with_inputs", [False, True])
def test_a_second_use_that_begins_after_some_steps_prevents_folding(with_inputs):
    """By an argument, then by an attribute that shows in the output's structure alone."""
    flag = {"input": INPUT, "is_auxiliary": True}
    for model, calls in (
        (Flagged(second_use_by_flag), [INPUT, flag]),
        (Net(with_auxiliary_output), [INPUT, INPUT, INPUT]),
    ):
        model.is_auxiliary = False
        examples = {"example_inputs": INPUT} if with_inputs else {}
        manager = prepare_compression(model, [QATConfig()], **examples)
        manager.on_train_begin()
        manager.on_epoch_begin(0)
        for index, inputs in enumerate(calls):
            model.is_auxiliary = index > 0
            step(manager, inputs, index, criterion=score)
        assert folded(manager) == {}
        model.eval()
        expected = tree_leaves(call_model(model, calls[-1]))
        actual = tree_leaves(call_model(manager.convert(INPUT), calls[-1]))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_second_use_that_only_training_has_is_seen_after_evaluation_too():
    def body(net, input):
        hidden = net.conv(input)
        return net.bn(hidden) + hidden if net.training else net.bn(hidden)

    model = Net(body)
    manager = prepare_compression(model, [QATConfig()])
    model.eval()(INPUT)
    assert folded(manager) == {"bn": "conv"}
    model.train()(INPUT)
    assert folded(manager) == {}


def test_evaluation_is_not_observed_in_the_place_of_the_next_training_pass():
    """Who measures layers reads what they return."""
    model = Net(with_auxiliary_output)
    model.is_auxiliary = False
    manager = prepare_compression(model, [QATConfig()])
    model(INPUT)
    model.body = lambda net, input: {"output": net.bn(net.conv(input))}
    model(INPUT)
    means = []
    handle = model.conv.register_forward_hook(lambda *call: means.append(call[-1].mean()))
    model.eval()(INPUT)
    handle.remove()
    assert folded(manager) == {"bn": "conv"}
    model.body = lambda net, input: {"output": net.bn(hidden := net.conv(input)) + hidden}
    model.train()(INPUT)
    assert folded(manager) == {}


def test_passes_of_a_kind_that_was_observed_are_not_observed_again():
    modes = []

    def body(net, input):
        modes.append(len(_get_current_dispatch_mode_stack()))
        return net.bn(net.conv(input))

    model = Net(body)
    prepare_compression(model, [QATConfig()])
    for factor in (1.0, 2.0, 3.0):
        model(INPUT * factor)
    assert modes == [1, 0, 0]


def test_layers_that_see_both_images_of_a_pair_are_folded():
    """As in siamese networks, which call one trunk for each image."""

    def body(net, input):
        return [net.bn(net.conv(image)) for image in (input, input.flip(3))]

    model = Net(body)
    manager = run(model)
    assert folded(manager) == {"bn": "conv"}
    converted = manager.convert()
    for actual, expected in zip(converted(INPUT), model.eval()(INPUT), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm])
def test_a_parametrized_convolution_stays_float_and_is_trained(parametrize):
    model = nn.Sequential(
        parametrize(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )
    manager = prepare_compression(model, [QATConfig()])
    model(INPUT).sum().backward()
    assert folded(manager) == {"3": "2"}
    kept = {layer.name: layer.quantized for layer in manager.report().layers}
    assert (kept["0"], kept["2"]) == (False, True)


def other_batch_norm(net, input, domain):
    return (net.bn2 if domain else net.bn)(net.conv(input))


def without_batch_norm(net, input, domain):
    hidden = net.conv(input)
    return hidden if domain else net.bn(hidden)


def other_convolution(net, input, domain):
    return net.bn((net.other if domain else net.conv)(input))


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("body", [other_batch_norm, without_batch_norm, other_convolution])
def test_a_pair_that_a_later_pass_parts_is_not_folded(body, with_inputs):
    torch.manual_seed(0)
    model = Net(body)
    model.forward_domain = 0
    model.body = lambda net, input: body(net, input, net.forward_domain)
    examples = {"example_inputs": INPUT} if with_inputs else {}
    manager = prepare_compression(model, [QATConfig()], **examples)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index, domain in enumerate([0, 0, 1, 1]):
        model.forward_domain = domain
        step(manager, INPUT * (1 + 3 * domain), index)
    model.eval()
    converted = manager.convert()
    assert folded(manager) == {}
    reasons = {layer.name: layer.detail for layer in manager.report().layers}
    assert "in some pass one was called without the other" in reasons["bn"]
    for domain in (0, 1):
        model.forward_domain = converted.forward_domain = domain
        torch.testing.assert_close(converted(INPUT), model(INPUT), rtol=1e-4, atol=1e-5)


def test_a_convolution_that_is_checkpointed_stays_in_its_pair():
    def body(net, input):
        return net.bn(checkpoint(net.conv, input, use_reentrant=False))

    manager = run(Net(body))
    assert folded(manager) == {"bn": "conv"}
    manager.convert()


def test_closing_after_an_interrupted_pass_ends_the_observation():
    def body(net, input):
        net.bn(net.conv(input))
        raise KeyboardInterrupt

    manager = prepare_compression(Net(body), [QATConfig()])
    with pytest.raises(KeyboardInterrupt), manager:
        manager.model(INPUT)
    assert not _get_current_dispatch_mode_stack()


def test_closing_before_the_first_forward_pass_ends_the_observation():
    model = Net(plain)
    manager = prepare_compression(model, [QATConfig()])
    manager.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model(INPUT)


def test_a_user_s_hook_that_raises_is_not_masked():
    model = Net(plain)

    def refuse(module, args, output):
        raise ValueError("from the hook")

    manager = None
    handle = model.register_forward_hook(refuse)
    manager = prepare_compression(model, [QATConfig()])
    with pytest.raises(ValueError, match="from the hook"):
        model(INPUT)
    handle.remove()
    model(INPUT)
    assert folded(manager) == {"bn": "conv"}


def test_a_path_that_only_evaluation_takes_prevents_folding():
    def body(net, input):
        hidden = net.conv(input)
        output = net.bn(hidden)
        return output if net.training else output + hidden

    model = Net(body)
    manager = run(model)
    assert folded(manager) == {"bn": "conv"}
    torch.testing.assert_close(manager.convert()(INPUT), model.eval()(INPUT), rtol=1e-5, atol=1e-5)
    assert folded(manager) == {}


def test_a_second_use_that_only_training_has_prevents_folding_too():
    def body(net, input):
        hidden = net.conv(input)
        output = net.bn(hidden)
        return output + hidden if net.training else output

    model = Net(body)
    manager = run(model)
    assert folded(manager) == {}
    torch.testing.assert_close(manager.convert()(INPUT), model.eval()(INPUT), rtol=1e-5, atol=1e-5)
    assert folded(manager) == {}


@pytest.mark.parametrize("is_residual", [True, False])
def test_a_quantized_sum_is_another_consumer(is_residual):
    class Summed(Net):
        def __init__(self):
            super().__init__(None)
            self.add = QuantizableAdd()

        def forward(self, input):
            hidden = self.conv(input)
            operands = self.bn(hidden), hidden
            return self.add(*operands if is_residual else operands[::-1])

    # From the first step on, so that the sum is one of integers when the pass is observed.
    manager = run(Summed(), forward="integer", fake_quantize_at=StartAt(step=0))
    assert folded(manager) == {}
    manager.convert()
