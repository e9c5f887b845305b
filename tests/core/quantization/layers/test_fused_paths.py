"""torch's fused transformer kernels must not bypass quantized children."""

import functools

import pytest
import torch
from torch import nn

from compression_manager import deploy
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_plugins.fake_quant import LayerRule
from quantization_reference import trained


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def encoder():
    return nn.TransformerEncoder(encoder_layer(), 2)


def fast_is_taken(model, input, mask):
    """Whether the float model, in eval without gradients, leaves its children uncalled."""
    calls = count_calls(model)
    with torch.no_grad():
        model.eval()(input, src_key_padding_mask=mask)
    return not any(calls.values())


def count_calls(model):
    """Count without forward hooks, which alone would turn the fused kernel off."""
    calls = {}

    def counting(name, module, *args):
        calls[name] += 1
        return type(module).forward(module, *args)

    for name, module in model.named_modules():
        if name.endswith(("linear1", "linear2")):
            calls[name] = 0
            module.forward = functools.partial(counting, name, module)
    return calls


MASK = torch.tensor([[False] * 4, [False, False, False, True], [False, False, True, True]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("build", [encoder_layer, encoder])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_evaluation_calls_the_quantized_children(build, masked, tmp_path):
    torch.manual_seed(0)
    mask = MASK if masked else None
    input = torch.randn(3, 4, 8)
    assert fast_is_taken(build(), input, mask)
    model = build()
    manager = trained(model, {"src": input, "src_key_padding_mask": mask})
    converted = manager.convert()
    manager.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", build())

    # The training path, which never takes the kernel: gradients are on, dropout is zero.
    model.eval()
    expected = model(input, src_key_padding_mask=mask)
    assert expected.requires_grad
    outputs = []
    for candidate in (model, converted, loaded):
        calls = count_calls(candidate)
        with torch.no_grad():
            outputs.append(candidate(input, src_key_padding_mask=mask))
        assert calls
        assert set(calls.values()) == {1}
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=0, atol=0)


def test_a_loaded_model_calls_the_children_of_a_layer_in_float_too(tmp_path):
    """So that it returns, to the last bit, what the converted model returns."""
    torch.manual_seed(0)
    input = torch.randn(3, 4, 8)
    build = lambda: nn.Sequential(encoder_layer(), nn.Linear(8, 4))
    manager = trained(build(), input, overrides=(LayerRule("0.*", skip=True),))
    manager.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", build())
    calls = count_calls(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input), manager.convert()(input), rtol=0, atol=0)
    assert set(calls.values()) == {1}


def test_closing_allows_the_kernel_again():
    model = encoder()
    before = [(model.use_nested_tensor, model.layers[0].activation_relu_or_gelu)]
    undo = disable_fused_paths(model)
    assert not model.use_nested_tensor
    assert not model.layers[0].activation_relu_or_gelu
    undo()
    assert before == [(model.use_nested_tensor, model.layers[0].activation_relu_or_gelu)]
