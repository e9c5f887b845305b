"""Files and state_dicts: sizes, loading, what is refused; copies, casts, export."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compression_manager.quantization import QuantizationScheme, Quantizer, dequantize
from integer_weights import TiedModel, state_bytes

INPUT = torch.randn(2, 24)


def network():
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 10))


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        (QuantizationScheme(), 0.26),
        (QuantizationScheme(symmetric=False), 0.26),
        (QuantizationScheme(granularity="channel"), 0.26),
        (QuantizationScheme(granularity="group", group_size=64), 0.275),
        (QuantizationScheme(4, granularity="channel"), 0.135),
        (QuantizationScheme(4, granularity="group", group_size=32), 0.165),
        (QuantizationScheme(3, granularity="channel"), 0.105),
        (QuantizationScheme(1, granularity="channel"), 0.042),
        (QuantizationScheme(16), 0.51),
    ],
    ids=str,
)
def test_share_of_the_float_file(scheme, limit, tmp_path):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128))
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    save_file(Quantizer(scheme).quantize_weights(model).state_dict(), tmp_path / "model")
    before = (tmp_path / "float.safetensors").stat().st_size
    after = (tmp_path / "model").stat().st_size
    assert limit * 0.9 < after / before < limit


def test_the_whole_way_through_a_file(tmp_path):
    quantizer = Quantizer(QuantizationScheme(4, granularity="group", group_size=8))
    trained = quantizer.quantize_weights(network())
    save_file(trained.state_dict(), tmp_path / "model.safetensors")

    fresh = quantizer.prepare(network())
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])
    assert torch.equal(fresh(INPUT), trained(INPUT))
    quantizer.dequantize_weights(fresh)
    assert type(fresh[0]) is nn.Linear
    assert torch.equal(fresh(INPUT), trained(INPUT))
    # Quantizing once more finds the same integers: every group keeps its largest value.
    again = quantizer.quantize_weights(fresh).state_dict()
    assert torch.equal(again["0.weight"], trained.state_dict()["0.weight"])


def test_loading_into_another_quantized_model():
    quantizer = Quantizer(QuantizationScheme(symmetric=False))
    first, second = (quantizer.quantize_weights(network()) for _ in range(2))
    assert not torch.equal(first(INPUT), second(INPUT))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(INPUT), second(INPUT))


def test_channels_last_weights_are_stored_as_safetensors_needs_them(tmp_path):
    quantizer = Quantizer(QuantizationScheme(granularity="channel"))
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    save_file(quantizer.quantize_weights(model).state_dict(), tmp_path / "model")
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_weights_are_stored_once(tmp_path):
    model = TiedModel()
    quantizer = Quantizer(QuantizationScheme())
    quantizer.quantize_weights(model)
    assert state_bytes(model) == (12 * 8 + 8 * 8) + 2 * (4 + 8 * 4) + 8 * 4
    assert not any(name.startswith("head") for name in model.state_dict())
    save_file(model.state_dict(), tmp_path / "model")  # refuses tensors that share memory
    fresh = quantizer.prepare(TiedModel())
    fresh.load_state_dict(load_file(tmp_path / "model"))
    assert torch.equal(fresh.head.weight, model.embedding.weight)
    for changed in (model, fresh, copy.deepcopy(model), model.double().float()):
        quantizer.dequantize_weights(changed)
        assert changed.head.weight is changed.embedding.weight
        quantizer.quantize_weights(changed)


def test_parts_of_a_tied_pair_are_dequantized_one_by_one():
    model, index = TiedModel(), torch.tensor([1, 5])
    quantizer = Quantizer(QuantizationScheme())
    expected = quantizer.quantize_weights(model)(index)
    only_head = copy.deepcopy(model)
    quantizer.dequantize_weights(only_head.head)
    assert isinstance(only_head.head.weight, nn.Parameter)
    assert torch.equal(only_head(index), expected)
    quantizer.dequantize_weights(model.embedding)
    assert torch.equal(model(index), expected)
    quantizer.dequantize_weights(model.head)
    assert model.head.weight is model.embedding.weight


def test_a_tie_within_one_module():
    module = nn.Module()
    module.a = module.b = nn.Parameter(torch.randn(3, 4))
    quantizer = Quantizer(QuantizationScheme())
    quantizer.quantize_weights(module)
    assert torch.equal(module.a, module.b)
    assert set(module.state_dict()) == {"a", "a_scale", "a_scheme"}
    quantizer.dequantize_weights(module)
    assert module.a is module.b


@pytest.mark.parametrize(
    ("mine", "theirs", "shown"),
    [
        (
            QuantizationScheme(granularity="channel"),
            QuantizationScheme(granularity="channel", axis=1),
            r"int8 symmetric per channel \(axis 1\) of shape \(6, 6\) there, and int8 symmetric "
            r"per channel \(axis 0\)",
        ),
        (QuantizationScheme(4), QuantizationScheme(4, signed=False), "uint4 symmetric"),
        (
            QuantizationScheme(4),
            QuantizationScheme(4, narrow_range=False),
            "int4 symmetric full-range per tensor .* there",
        ),
        (
            QuantizationScheme(4, granularity="group", group_size=4),
            QuantizationScheme(4, granularity="group", group_size=5),
            "per group of 5 of shape",
        ),
        (QuantizationScheme(4), QuantizationScheme(), "'0.weight' is int8 symmetric"),
    ],
    ids=str,
)
def test_another_scheme_is_refused(mine, theirs, shown):
    saved = Quantizer(theirs).quantize_weights(nn.Sequential(nn.Linear(6, 6))).state_dict()
    model = Quantizer(mine).quantize_weights(nn.Sequential(nn.Linear(6, 6)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=shown):
        model.load_state_dict(saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_equal_schemes_in_other_words_are_the_same():
    saved = Quantizer(QuantizationScheme(granularity="channel", axis=-1)).quantize_weights(
        nn.Linear(6, 5)
    )
    model = Quantizer(QuantizationScheme(granularity="channel", axis=1)).prepare(nn.Linear(6, 5))
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model.weight, saved.weight)


def test_packed_integers_of_another_shape_are_refused():
    quantizer = Quantizer(QuantizationScheme(4))
    saved = quantizer.quantize_weights(nn.Linear(6, 4, bias=False)).state_dict()
    model = quantizer.prepare(nn.Linear(4, 6, bias=False))
    with pytest.raises(RuntimeError, match=r"of shape \(4, 6\) there, .* of shape \(6, 4\) here"):
        model.load_state_dict(saved)


def test_floats_are_refused_and_leave_the_integers():
    model = Quantizer(QuantizationScheme()).quantize_weights(nn.Linear(6, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"'weight' is torch.float32 there, and integers"):
        model.load_state_dict(nn.Linear(6, 4).state_dict(), strict=False)
    assert all(torch.equal(item, before[name]) for name, item in model.state_dict().items())


def test_missing_and_surplus_tensors_are_reported_by_torch():
    saved = Quantizer(QuantizationScheme()).quantize_weights(nn.Linear(6, 4)).state_dict()
    model = Quantizer(QuantizationScheme()).prepare(nn.Linear(6, 4))
    del saved["weight_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_scale"'):
        model.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_scale"'):
        nn.Linear(6, 4).load_state_dict(model.state_dict())


def test_a_model_on_the_meta_device_is_prepared_and_filled():
    quantizer = Quantizer(QuantizationScheme(4, symmetric=False))
    saved = quantizer.quantize_weights(network())
    with torch.device("meta"):
        model = network()
    quantizer.prepare(model).load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(model(INPUT), saved(INPUT))


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("make", [network, TiedModel, lambda: nn.LSTM(24, 4)])
def test_copies_are_independent(duplicate, make):
    quantizer = Quantizer(QuantizationScheme(4))
    model = quantizer.quantize_weights(make())
    input = torch.tensor([1, 7]) if isinstance(model, TiedModel) else INPUT
    copied = duplicate(model)
    expected = model(input)
    for tensor in model.state_dict().values():
        tensor.zero_()
    found = copied(input)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert torch.equal(found, expected)
    quantizer.dequantize_weights(copied)
    assert [type(item) for item in copied.modules()] == [type(item) for item in make().modules()]


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_change_what_is_computed_and_nothing_stored(dtype):
    model = Quantizer(QuantizationScheme(granularity="channel")).quantize_weights(network())
    before = copy.deepcopy(model.state_dict())
    expected = model(INPUT)
    model.to(dtype)
    weight = before["0.weight"], before["0.weight_scale"]
    assert torch.equal(model[0].weight, dequantize(*weight, 0, 0, dtype))
    assert model(INPUT.to(dtype)).dtype == dtype
    model.float()
    for name, tensor in model.state_dict().items():
        if ".weight" in name:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    if dtype == torch.float64:
        assert torch.equal(model(INPUT), expected)


def test_scales_move_with_the_model():
    model = Quantizer(QuantizationScheme()).quantize_weights(network())
    model.to(torch.device("meta"), torch.float16)
    assert all(item.is_meta for item in model.state_dict().values())
    assert model[0].weight_scale.dtype == torch.float32
    assert (model[0].weight.dtype, model[0].weight.is_meta) == (torch.float16, True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [QuantizationScheme(granularity="channel"), QuantizationScheme(3, symmetric=False)],
    ids=str,
)
def test_exports_with_integers(scheme, strict):
    model = Quantizer(scheme).quantize_weights(network().eval())
    program = torch.export.export(model, (INPUT,), strict=strict)
    assert torch.equal(program.module()(INPUT), model(INPUT))
    for name, tensor in model.state_dict().items():
        assert torch.equal(program.state_dict[name], tensor)
        assert program.state_dict[name].dtype == tensor.dtype
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("compression_manager.dequantize.default") == 2


def test_compiles_without_graph_breaks():
    model = Quantizer(QuantizationScheme(4)).quantize_weights(TiedModel().eval())
    index = torch.tensor([1, 4])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(index), model(index))


def test_functional_calls_replace_the_integers():
    first, second = (Quantizer(QuantizationScheme()).quantize_weights(network()) for _ in range(2))
    found = torch.func.functional_call(first, second.state_dict(), (INPUT,))
    assert torch.equal(found, second(INPUT))
