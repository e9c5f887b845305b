"""`save_converted` and `deploy.load`: exact, verified, and independent of the training plugins."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from torch import nn

import toys
from compression_manager import deploy
from compression_manager.deploy import storage
from compression_manager.deploy.storage import FORMAT_NAME, FORMAT_VERSION
from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    QuantizationError,
)
from compression_manager.quantization.integer.cpu_features import CpuFeatures
from compression_manager.state import atomic_directory
from conformance_models import Block
from quantization_reference import prepared, trained

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.norm = nn.LayerNorm(6)
        self.copy = self.norm
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input):
        return self.head(self.copy(self.embedding(input)))


MODELS = {
    "conv": (toys.ConvNet, IMAGES),
    "mlp": (toys.mlp, VECTORS),
    "one layer": (lambda: nn.Linear(6, 4), VECTORS),
    "tied": (Tied, torch.arange(12)),
    "bfloat16": (lambda: toys.mlp().bfloat16(), VECTORS.bfloat16()),
}


def saved(name, directory, **options):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    manager = trained(build(), inputs, **options)
    converted = manager.convert()
    assert manager.save_converted(directory) == directory
    return converted, build, inputs


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_exactly(name, tmp_path):
    converted, build, inputs = saved(name, tmp_path / "int8")
    torch.manual_seed(1)
    fresh = build()
    loaded = deploy.load(tmp_path / "int8", fresh)
    if name != "one layer":
        assert loaded is fresh
    assert not any(module.training for module in loaded.modules())
    expected, actual = converted.state_dict(), loaded.state_dict()
    assert list(expected) == list(actual)
    for key in expected:
        assert expected[key].dtype == actual[key].dtype
        assert torch.equal(expected[key], actual[key])
    assert torch.equal(loaded(inputs), converted(inputs))


@pytest.mark.parametrize("forward", ["auto", "integer", "fake"])
def test_a_loaded_model_computes_as_it_was_trained(forward, tmp_path):
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), Block(nn.Identity()), nn.Flatten(), nn.Linear(8 * 14 * 14, 32),
            nn.ReLU(), nn.Linear(32, 32),
        )  # fmt: skip

    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    manager = trained(build(), images, forward=forward)
    converted = manager.convert()
    manager.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", build())
    assert torch.equal(loaded(images), converted(images))
    specs = [layer.spec for layer in loaded.modules() if isinstance(layer, deploy.ConvertedLayer)]
    assert {spec.forward for spec in specs} == {forward}


def test_tied_weights_are_saved_once_and_tied_again(tmp_path):
    saved("tied", tmp_path / "int8")
    tensors = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    assert {name for name, value in tensors.items() if value.dtype == torch.int8} == {
        "embedding.weight"
    }
    loaded = deploy.load(tmp_path / "int8", Tied())
    assert loaded.embedding.integer_weight() is loaded.head.integer_weight()
    assert loaded.norm.weight is loaded.copy.weight


class TwoNorms(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.head = nn.Linear(6, 6)
        self.first = nn.LayerNorm(6)
        self.second = self.first if tied else nn.LayerNorm(6)
        if not tied:
            nn.init.constant_(self.second.weight, 2.0)

    def forward(self, input):
        return self.second(self.head(self.first(input)))


def test_two_tensors_are_not_loaded_into_one(tmp_path):
    manager = trained(TwoNorms(tied=False), VECTORS)
    manager.save_converted(tmp_path / "int8")
    fresh = TwoNorms(tied=True)
    with pytest.raises(
        CheckpointMismatchError, match=r"'first\.weight' and 'second\.weight' are one"
    ):
        deploy.load(tmp_path / "int8", fresh)
    assert type(fresh.head) is nn.Linear


def test_one_tensor_is_loaded_into_two(tmp_path):
    manager = trained(TwoNorms(tied=True), VECTORS)
    converted = manager.convert()
    manager.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", TwoNorms(tied=False))
    assert torch.equal(loaded(VECTORS), converted(VECTORS))


def test_a_model_without_memory_is_refused(tmp_path):
    saved("mlp", tmp_path / "int8")
    with torch.device("meta"):
        fresh = toys.mlp()
    with pytest.raises(CheckpointMismatchError, match="on the device 'meta'"):
        deploy.load(tmp_path / "int8", fresh)
    deploy.load(tmp_path / "int8", fresh.to_empty(device="cpu"))


def test_the_directory_holds_integers_and_no_float_copy(tmp_path):
    saved("conv", tmp_path / "int8")
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {
        "model.safetensors", "quantization.json", "manifest.json",
    }  # fmt: skip
    tensors = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    assert {name for name, value in tensors.items() if value.dtype == torch.int8} == {
        "conv1.weight", "conv2.weight", "fc.weight",
    }  # fmt: skip
    assert not any(name.startswith("bn") for name in tensors)
    document = json.loads((tmp_path / "int8" / "quantization.json").read_text())
    assert [(item["name"], item["absorbed"]) for item in document["layers"]] == [
        ("conv1", ["bn1"]), ("conv2", ["bn2"]), ("fc", []),
    ]  # fmt: skip


def test_saving_converts_if_need_be_and_replaces_what_was_there(tmp_path):
    manager = trained(toys.mlp(), VECTORS)
    manager.save_converted(str(tmp_path / "int8"))
    first = deploy.load(tmp_path / "int8", toys.mlp())(VECTORS)
    with torch.no_grad():
        manager.model[0].weight.add_(0.5)
    manager.convert()
    manager.save_converted(tmp_path / "int8")
    assert not torch.equal(deploy.load(tmp_path / "int8", toys.mlp())(VECTORS), first)


def test_saving_an_untrained_model_leaves_what_was_there(tmp_path):
    saved("mlp", tmp_path / "int8")
    before = {path.name: path.read_bytes() for path in (tmp_path / "int8").iterdir()}
    with pytest.raises(QuantizationError, match="has not begun"):
        prepared(toys.mlp()).save_converted(tmp_path / "int8")
    assert {path.name: path.read_bytes() for path in (tmp_path / "int8").iterdir()} == before


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(6, 6), Extra(6, 4))
    manager = trained(model, VECTORS)
    with pytest.raises(CheckpointError, match=r"'1._extra_state' of the model's state, a dict"):
        manager.save_converted(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


# Without the training plugins -------------------------------------------------------------------

LOADER = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "compression_plugins":
                raise ImportError("blocked: " + name)

    sys.meta_path.insert(0, Blocker())
    import safetensors.torch
    import torch
    import toys
    from compression_manager import deploy

    directory, inputs, outputs = sys.argv[1:]
    loaded = deploy.load(directory, toys.ConvNet())
    images = safetensors.torch.load_file(inputs)["images"]
    safetensors.torch.save_file({"output": loaded(images)}, outputs)
    assert not any(name.startswith("compression_plugins") for name in sys.modules)
"""


@pytest.mark.parametrize("native", ["0", "1"])
def test_a_fresh_interpreter_computes_the_same_without_training_plugins(tmp_path, native):
    converted, _, images = saved("conv", tmp_path / "int8")
    safetensors.torch.save_file({"images": images}, tmp_path / "inputs")
    script = f"import sys; sys.path[:0] = {sys.path!r}\n" + textwrap.dedent(LOADER)
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "int8", tmp_path / "inputs", tmp_path / "out"],
        check=True,
        timeout=120,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "COMPRESSION_MANAGER_NATIVE": native,
        },
    )
    output = safetensors.torch.load_file(tmp_path / "out")["output"]
    assert torch.equal(output, converted(images))


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "quantization.json", "manifest.json"])
def test_every_corrupted_byte_is_found(name, tmp_path):
    saved("mlp", tmp_path / "int8")
    path = tmp_path / "int8" / name
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 25)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        model = toys.mlp()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointCorruptError):
            deploy.load(tmp_path / "int8", model)
        assert_unchanged(model, before)


def assert_unchanged(model, before):
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[key], before[key]) for key in before)
    assert model.training


class Views(nn.Module):
    """Buffers that lie in each other's memory."""

    def __init__(self, seed=0):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        values = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        for name, view in {
            "first": values[:6],
            "second": values[4:8],
            "square": values.reshape(3, 4),
            "turned": values.reshape(3, 4).t(),
        }.items():
            self.register_buffer(name, view)

    def forward(self, input):
        output = self.linear(input * self.first) * self.second
        return output + self.square[0] * self.turned[0, 0]


def test_buffers_that_overlap_are_saved(tmp_path):
    converted = trained(Views(), VECTORS)
    converted.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", Views(seed=1))
    assert torch.equal(loaded(VECTORS), converted.convert()(VECTORS))


class OtherLinear(nn.Linear):
    pass


class Linear(nn.Linear):
    """Of the user's own, whose arithmetic nobody knows."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: toys.mlp(hidden=9), r"tensor '0.weight' is torch.int8 \(8, 6\), the model needs"),
        (lambda: toys.mlp().double(), "the model needs torch.float64"),
        (toys.ConvNet, "the model has no layer '0'"),
        (lambda: nn.Sequential(*toys.mlp(), nn.LayerNorm(4)), "holds no tensor '3.weight'"),
        (
            lambda: nn.Sequential(OtherLinear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
            "layer '0' was a Linear; here it is a OtherLinear",
        ),
        (
            lambda: nn.Sequential(Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
            f"layer '0' was a Linear; here it is a Linear of {__name__}",
        ),
        (lambda: nn.Sequential(*toys.mlp()[:2], nn.Linear(8, 5)), "tensor '2.weight'"),
        (lambda: prepared(toys.mlp()).model, "here it is a QuantizedLinear"),
    ],
)
def test_another_architecture_is_refused_and_left_unchanged(build, message, tmp_path):
    saved("mlp", tmp_path / "int8")
    model = build()
    classes = [type(module) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match=message):
        deploy.load(tmp_path / "int8", model)
    assert_unchanged(model, before)
    assert [type(module) for module in model.modules()] == classes


def test_a_tensor_without_a_place_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    trained(model, VECTORS).save_converted(tmp_path / "int8")
    with pytest.raises(CheckpointMismatchError, match=r"'1\.\w+' has no place in the model"):
        deploy.load(tmp_path / "int8", nn.Sequential(nn.Linear(6, 4), nn.ReLU()))


def test_a_foreign_directory_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="converted"):
            deploy.load(directory, toys.mlp())
    with atomic_directory(tmp_path / "checkpoint", format_name="something else") as temporary:
        (temporary / "file").write_text("content")
    with pytest.raises(CheckpointError, match="something else"):
        deploy.load(tmp_path / "checkpoint", toys.mlp())


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "{}",
        '{"layers": [{}], "tied": {}}',
        '{"layers": 3, "tied": {}}',
        '{"layers": [{"name": "0", "absorbed": [], "kind": "Linear", "weight": null, '
        '"input": null, "bias": false, "forward": "fast"}], "tied": {}}',
        "not json",
        "[" * 9999,
    ],
)
def test_a_sound_directory_with_a_strange_document_is_refused(document, tmp_path):
    saved("mlp", tmp_path / "good")
    tensors = (tmp_path / "good" / "model.safetensors").read_bytes()
    format_name = json.loads((tmp_path / "good" / "manifest.json").read_text())["format"]
    odd = atomic_directory(tmp_path / "odd", format_name=format_name, version=FORMAT_VERSION)
    with odd as temporary:
        (temporary / "model.safetensors").write_bytes(tensors)
        (temporary / "quantization.json").write_text(document)
    with pytest.raises(CheckpointCorruptError, match=r"quantization\.json cannot be read"):
        deploy.load(tmp_path / "odd", toys.mlp())


def test_what_an_earlier_version_saved_is_refused_and_can_be_replaced(tmp_path):
    saved("mlp", tmp_path / "new")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    old = atomic_directory(tmp_path / "int8", format_name=FORMAT_NAME, version=1)
    with old as temporary:
        for name in ("model.safetensors", "quantization.json"):
            (temporary / name).write_bytes(files[name])
    model = toys.mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = r"int8 has version 1 of .* integers are not packed; .* version 2\. Convert .* again"
    with pytest.raises(CheckpointError, match=message):
        deploy.load(tmp_path / "int8", model)
    assert_unchanged(model, before)
    converted, build, inputs = saved("mlp", tmp_path / "int8")
    assert torch.equal(deploy.load(tmp_path / "int8", build())(inputs), converted(inputs))


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module to change, got dict"):
        deploy.load(tmp_path, {})


@pytest.mark.parametrize("vnni", [False, True])
def test_loading_builds_native_kernels_only_where_others_are_slow(tmp_path, monkeypatch, vnni):
    saved("conv", tmp_path / "int8")
    asked = []
    features = CpuFeatures(vnni=vnni, amx=False)
    monkeypatch.setattr(storage, "cpu_features", lambda: features)
    monkeypatch.setattr(storage, "prepare_native", lambda *, builds: asked.append(builds))
    deploy.load(tmp_path / "int8", MODELS["conv"][0]())
    assert asked == [not vnni]
