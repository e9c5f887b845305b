"""`manager.convert()`: a new eval-mode model, and a training model that nothing happened to."""

import copy
import functools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import Plugin, PluginConfig, deploy, hookimpl, prepare_compression
from compression_manager.deploy import (
    ConvertedEmbedding,
    ConvertedLayer,
    ConvertedLinear,
    LayerSpec,
)
from compression_manager.deploy.conversion import Conversion
from compression_manager.errors import ParityError, QuantizationError
from compression_manager.models.hooks import _DetachableHook
from compression_manager.quantization import FakeQuantizer, QuantizationScheme, choose_qparams
from compression_manager.quantization.arithmetic.parameters import QuantizationParameters
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_manager.quantization.layers import QuantizedLayer
from compression_plugins.distillation import DistillationConfig
from compression_plugins.fake_quant import LayerRule, QATConfig
from quantization_reference import prepared, step, trained

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]
INDICES = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))


class Language(nn.Module):
    """An embedding tied to the head; the code asks a layer for its width."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, input):
        width = self.embedding.embedding_dim
        assert self.head.out_features == self.embedding.num_embeddings == 12
        assert self.embedding.padding_idx == 0
        return self.head(self.norm(self.embedding(input) * math.sqrt(width)))


class Twice(nn.Module):
    """One Linear under two names, called under both; one conv called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 4)

    def forward(self, input):
        return self.head(F.relu(self.second(F.relu(self.first(input)))))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, vectors, scale=1.0):
        return {"logits": self.linear(input=vectors) * scale}


MODELS = {
    "conv": (toys.ConvNet, IMAGES),
    "mlp": (toys.mlp, VECTORS),
    "one layer": (lambda: nn.Linear(6, 4), VECTORS),
    "tied": (Language, INDICES),
    "twice": (Twice, VECTORS),
    "keywords": (Keywords, {"vectors": VECTORS, "scale": 2.0}),
}


def built(name, steps=3):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build()
    return trained(model, inputs, steps=steps), model, inputs


def call(model, inputs):
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output["logits"] if isinstance(output, dict) else output


def snapshot(model):
    """Everything that conversion must not touch."""
    state = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "tensors": {n: (id(t), t._version, t.detach().clone()) for n, t in state.items()},
        "gradients": {n: None if g is None else g.clone() for n, g in gradients.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "hooks": {n: (*m._forward_hooks, *m._forward_pre_hooks) for n, m in modules.items()},
        "random": torch.get_rng_state(),
    }


def assert_same(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, tuple):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


@pytest.mark.parametrize("name", MODELS)
def test_conversion_leaves_the_training_model_untouched(name):
    manager, model, inputs = built(name)
    call(model, inputs).square().sum().backward()
    (model if name == "one layer" else next(model.children())).eval()  # modes need not be uniform
    before = snapshot(model)
    converted = manager.convert()
    assert manager.model is model
    assert_same(before, snapshot(model))
    with torch.no_grad():
        for tensor in converted.state_dict().values():
            tensor.zero_()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_equals_the_trained_one(name):
    manager, model, inputs = built(name)
    converted = manager.convert()
    assert not any(module.training for module in converted.modules())
    parity = manager._conversion.parity
    layers = {n for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert set(parity.layer_errors) == layers
    assert max(parity.layer_errors.values()) < 1e-6
    model.eval()
    torch.testing.assert_close(call(converted, inputs), call(model, inputs), rtol=1e-5, atol=1e-6)
    # It differs from the float model, or there would be nothing to compare.
    manager.close()
    assert not torch.allclose(call(converted, inputs), call(model, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_quantized_weights_are_held_as_integers_alone(name):
    manager, model, inputs = built(name)
    call(model, inputs).square().sum().backward()  # gradients are not copied either
    converted = manager.convert()
    floats = [m.weight for m in model.modules() if isinstance(m, QuantizedLayer)]
    shapes = {tuple(weight.shape) for weight in floats}
    assert not any(isinstance(m, (QuantizedLayer, FakeQuantizer)) for m in converted.modules())
    for module in converted.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in (item for item in held if isinstance(item, torch.Tensor)):
            assert not (tensor.is_floating_point() and tuple(tensor.shape) in shapes)
            assert tensor.grad is None
        if isinstance(module, ConvertedLayer):
            assert module.integer_weight().dtype == torch.int8
            assert not list(module.parameters())


def test_tied_weights_share_their_integers():
    manager, _, _ = built("tied")
    converted = manager.convert()
    assert isinstance(converted.embedding, ConvertedEmbedding)
    assert isinstance(converted.head, ConvertedLinear)
    assert converted.embedding.integer_weight() is converted.head.integer_weight()
    assert converted.embedding.weight_scale is converted.head.weight_scale


def test_tied_weights_with_different_schemes_do_not_share():
    rule = LayerRule("head", weight=QATConfig().activation)
    manager = trained(Language(), INDICES, overrides=(rule,))
    converted = manager.convert()
    assert not torch.equal(converted.embedding.weight, converted.head.weight)


class PlainLinearsConfig(PluginConfig):
    plugin = "plain_linears"


class PlainLinears(Plugin[PlainLinearsConfig]):
    """Converts layers that no plugin trains."""

    config_class = PlainLinearsConfig

    @hookimpl
    def convert_model(self, conversion):
        scheme = QuantizationScheme(granularity="channel")
        for name, layer in list(conversion.model.named_modules()):
            if isinstance(layer, nn.Linear):
                converted = ConvertedLinear(layer, LayerSpec("Linear", scheme, None, True))
                weight = layer.weight.detach()
                scale, zero_point = choose_qparams(weight.amin(1), weight.amax(1), scheme)
                limits = scheme.quant_min, scheme.quant_max, scheme.axis
                parameters = QuantizationParameters(scale, zero_point, *limits)
                converted.fill(weight, parameters, None, layer.bias)
                conversion.replace(name, converted)


def test_layers_that_are_not_trained_are_replaced():
    model = toys.mlp()
    manager = prepare_compression(model, [PlainLinears(PlainLinearsConfig())])
    converted = manager.convert()
    assert isinstance(converted[0], ConvertedLinear)
    torch.testing.assert_close(converted[0].weight * 1, model[0].weight.data, rtol=0, atol=0.01)


def test_a_module_with_two_names_is_replaced_under_both():
    manager, model, _ = built("twice")
    converted = manager.convert()
    assert converted.first is converted.second
    assert isinstance(converted.first, ConvertedLinear)
    assert model.first is model.second


def test_one_layer_becomes_the_converted_layer():
    manager, model, _ = built("one layer")
    assert isinstance(manager.convert(), ConvertedLinear)
    assert isinstance(model, nn.Linear)


# Hooks ------------------------------------------------------------------------------------------


class Tapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = toys.mlp()
        self.norm = nn.LayerNorm(4)
        self.handle = self.norm.register_forward_hook(self._double)

    def _double(self, module, args, output):
        return output * 2

    def forward(self, input):
        return self.norm(self.body(input))


def test_the_copy_has_neither_the_user_s_taps_nor_the_manager_s_hooks():
    torch.manual_seed(0)
    model = Tapped()
    seen = []
    lock = threading.Lock()  # deepcopy cannot copy it

    class Trainer:
        def __init__(self):
            self.lock = lock

        def tap(self, module, args, output):
            seen.append(module)

    trainer = Trainer()
    for module in (model, model.body, model.body[0], model.norm):
        module.register_forward_hook(lambda module, args, output: seen.append(module))
        module.register_forward_hook(trainer.tap)
        module.register_forward_pre_hook(functools.partial(lambda s, m, a: seen.append(m), seen))
    model.norm.register_full_backward_hook(lambda module, grads, outputs: seen.append(module))
    manager = prepare_compression(
        model, [DistillationConfig(Tapped()), QATConfig()], example_inputs=VECTORS
    )
    manager._context.model_hooks.add_forward_hook(model.norm, lambda *args: seen.append(model))
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(2):
        step(manager, VECTORS, index)
    converted = manager.convert()
    seen.clear()
    output = converted(VECTORS)
    assert seen == []
    hooks = [hook for module in converted.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == 1
    assert hooks[0].__self__ is converted
    assert not any(m._forward_pre_hooks or m._backward_hooks for m in converted.modules())
    assert not any(isinstance(hook, _DetachableHook) for hook in hooks)
    model.eval()
    torch.testing.assert_close(output, model(VECTORS))
    assert seen  # the training model's taps go on


@pytest.mark.parametrize("where", ["0", "1"])
def test_a_hook_from_outside_that_changes_a_result_fails_loudly(where):
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    model.get_submodule(where).register_forward_hook(lambda module, args, output: output * 2)
    manager = prepared(model, [VECTORS] * 2)
    with pytest.raises(ParityError):
        manager.convert()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_normalization_by_hooks_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 4))
    manager = trained(model, VECTORS)
    converted = manager.convert()
    model.eval()
    with torch.no_grad():
        assert torch.equal(converted(VECTORS), model(VECTORS))
        converted[0].weight_g.mul_(2.0)
    assert not torch.allclose(converted(VECTORS), model(VECTORS))


def test_modules_that_keep_activations_convert():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.cache = {}

        def forward(self, input):
            self.last = self.linear(input)
            self.cache["history"] = [self.last * 2]
            return self.last

    model = Caching()
    manager = trained(model, VECTORS)
    last = model.last
    assert not last.is_leaf
    converted = manager.convert()
    assert model.last is last
    assert converted.last.is_leaf


def test_a_model_that_cannot_be_copied_is_an_error_of_ours():
    model = toys.mlp()
    manager = trained(model, VECTORS)
    model.lock = threading.Lock()
    with pytest.raises(QuantizationError, match="cannot be copied"):
        manager.convert()


def normalized():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))


def test_calls_compute_the_same_whether_gradients_are_on(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(16, 8)
    manager = trained(normalized(), inputs)
    converted = manager.convert()
    manager.save_converted(tmp_path / "int8")
    for model in (converted, deploy.load(tmp_path / "int8", normalized())):
        with torch.no_grad():
            expected = model(inputs)
        output = model(inputs)
        assert torch.equal(output, expected)
        assert not output.requires_grad
        leaf = inputs.clone().requires_grad_()
        model(leaf).sum().backward()  # as what explains a prediction wants it
        assert leaf.grad is not None
        assert leaf.grad.any()
    assert all(parameter.requires_grad for parameter in manager.model.parameters())


class Sharing(nn.Sequential):
    """Its copies have the same last module, as those of a model with a large frozen part may."""

    def __deepcopy__(self, memo):
        shared = Sharing(*(copy.deepcopy(layer, memo) for layer in self[:-1]), self[-1])
        return shared.train(self.training)


def test_what_the_copy_shares_with_the_trained_model_is_trained_on():
    model = Sharing(nn.Linear(6, 8), nn.LayerNorm(8))
    trained(model, VECTORS).convert()
    assert model[-1].weight.requires_grad


def test_converting_twice_and_training_on():
    manager, model, inputs = built("mlp")
    first = manager.convert()
    output = first(inputs)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for index in range(3, 6):
        step(manager, inputs, index, optimizer)
    assert torch.equal(first(inputs), output)
    second = manager.convert()
    model.eval()
    assert torch.equal(second(inputs), model(inputs))
    assert not torch.equal(second(inputs), output)


def test_a_deep_copy_of_the_converted_model_works():
    manager, _, inputs = built("conv")
    converted = manager.convert()
    assert torch.equal(copy.deepcopy(converted)(inputs), converted(inputs))


def test_what_torch_compile_returned_calls_the_new_layer():
    wrapped = torch.compile(nn.Linear(6, 4), backend="eager")
    conversion = Conversion(nn.Sequential(wrapped))
    old, new = wrapped._orig_mod, trained(nn.Linear(6, 4), VECTORS).convert()
    assert isinstance(new, ConvertedLayer)
    with torch.no_grad(), reference_arithmetic():  # what is compiled takes no integer kernels
        conversion.replace("0._orig_mod", new)
        assert torch.equal(conversion.model(VECTORS), new(VECTORS))
        conversion.undo()
        assert torch.equal(conversion.model(VECTORS), old(VECTORS))
