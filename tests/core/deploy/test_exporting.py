"""`export`: checked before the file is left in place, and nothing left of a failure."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy, prepare_compression
from compression_manager.deploy import formats
from compression_manager.errors import (
    CheckpointError,
    ConfigError,
    LifecycleError,
    NotExportableError,
    ParityError,
)
from compression_manager.integrations import onnx_export
from compression_manager.models.calling import call_model, tensors_in
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_plugins import QATConfig
from quantization_reference import prepared, trained

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]
# OpenVINO's files are made of ONNX, and have tests of their own; compiling takes too long for here.
FORMATS = ["onnx", "torch"]
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return trained(toys.ConvNet(), IMAGES).convert()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return trained(toys.mlp(), VECTORS).convert()


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let these packages seem missing."""
    monkeypatch.setattr(
        deploy.packages,
        "find_spec",
        lambda name: None if name in packages else importlib.util.find_spec(name),
    )


def load(path: Path, format: str) -> Callable[[Any], list[Tensor]]:
    """What runs a file, and returns the tensors of its outputs."""
    run = formats.FORMATS[format].load(path, int8=False)
    return lambda inputs: list(tensors_in(call_model(run, inputs)))


# What is returned and written ----------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_result_says_what_was_written(format: str, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / f"model{SUFFIX[format]}"
    result = deploy.export(mlp(), path, format, VECTORS)
    assert isinstance(result, deploy.Export)
    assert (result.path, result.format, result.unchecked) == (path, format, None)
    assert result.size == path.stat().st_size
    assert result.output_error is not None
    assert 0 <= result.output_error <= formats.FORMATS[format].tolerance
    assert f"{result.output_error:.1e}" in str(result)
    assert list(path.parent.iterdir()) == [path]


def test_onnx_has_quantized_inputs_and_integer_weights(tmp_path: Path) -> None:
    deploy.export(conv_net(), tmp_path / "model.onnx", "onnx", IMAGES)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [item.version for item in model.opset_import if item.domain == ""] == [18]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 3  # the inputs of two convolutions and of fc
    assert kinds.count("DequantizeLinear") == 6  # and the weights
    assert kinds.count("BatchNormalization") == 0
    large = [item for item in model.graph.initializer if len(item.dims) > 1]
    assert len(large) == 3
    assert {item.data_type for item in large} == {onnx.TensorProto.INT8}


def test_onnx_names_the_batch(tmp_path: Path) -> None:
    deploy.export(mlp(), tmp_path / "model.onnx", "onnx", VECTORS)
    graph = onnx.load(tmp_path / "model.onnx").graph
    for value in (*graph.input, *graph.output):
        batch, features = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert features.dim_value in {6, 4}


def test_torch_stores_integers_and_no_example(tmp_path: Path) -> None:
    model, path = mlp(), tmp_path / "model.pt2"
    deploy.export(model, path, "torch", torch.randn(10_000, 6))
    program = torch.export.load(path)
    assert program.example_inputs is None
    assert path.stat().st_size < 100_000  # the example has 240,000 bytes
    for name, value in model.state_dict().items():
        assert torch.equal(program.state_dict[name], value)
        assert program.state_dict[name].dtype == value.dtype


def test_files_hold_weights_and_operators_and_little_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(6)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.Flatten(), nn.LazyLinear(4))
    net(images)
    model = trained(net, images).convert()
    weights = sum(value.nbytes for value in model.state_dict().values())
    written = deploy.export(model, tmp_path / "model.onnx", "onnx", images)
    assert written.size < 1.5 * weights
    graph = onnx.load(written.path).graph
    computed = {name for node in graph.node for name in node.output}
    assert {item.name for item in graph.value_info} <= computed  # onnxruntime fuses by them
    assert not any(item.metadata_props for item in (graph, *graph.node, *graph.value_info))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, input: Tensor) -> Tensor:
        output = self.fc(input)
        chosen: Tensor = torch.cond(output.sum() > 0, torch.sin, torch.cos, (output,))
        return chosen


def test_files_name_no_place_in_anybodys_source(tmp_path: Path) -> None:
    model = Branching()
    for format in FORMATS:
        path = tmp_path / f"model{SUFFIX[format]}"
        deploy.export(model, path, format, VECTORS)
        content = path.read_bytes()
        assert b"in forward" not in content
        assert b".py" not in content
        assert b"pkg.torch" not in content


@pytest.mark.slow
def test_torch_needs_nothing_of_this_package(tmp_path: Path) -> None:
    model = conv_net()
    deploy.export(model, tmp_path / "model.pt2", "torch", IMAGES)
    torch.save((IMAGES[:3], model(IMAGES[:3])), tmp_path / "expected.pt")
    script = """
        import sys
        import torch

        module = torch.export.load("model.pt2").module()
        inputs, expected = torch.load("expected.pt")
        torch.testing.assert_close(module(inputs), expected)
        assert not any(name.startswith("compression_manager") for name in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("format", FORMATS)
def test_the_model_stays_as_it_was(format: str, tmp_path: Path) -> None:
    model = mlp().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    deploy.export(model, tmp_path / f"model{SUFFIX[format]}", format, VECTORS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("format", FORMATS)
def test_one_sample_is_enough_of_an_example(format: str, tmp_path: Path) -> None:
    result = deploy.export(mlp(), tmp_path / f"model{SUFFIX[format]}", format, VECTORS[:1])
    run = load(result.path, format)
    (output,) = run(VECTORS[:9])
    assert output.shape == (9, 4)


def test_a_terminal_or_a_line_says_that_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy.export(mlp(), tmp_path / "model.pt2", "torch", VECTORS)
    assert capsys.readouterr().err == "exporting model.pt2 (torch) ...\n"


def test_onnx_is_silent_about_what_is_not_installed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    deploy.export(mlp(), tmp_path / "model.onnx", "onnx", VECTORS)
    assert capfd.readouterr().err == "exporting model.onnx (onnx) ...\n"
    assert "torchvision" not in caplog.text


def test_rows_of_a_table_with_scales_per_group_are_looked_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    indices = torch.randint(20, (5, 3), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(48, 4))
    groups = QuantizationScheme(4, granularity="group", group_size=6)
    manager = prepared(model, [indices] * 2, weight=groups, activation=None)
    converted = manager.convert(indices)
    deploy.export(converted, tmp_path / "table.onnx", "onnx", indices)
    for size in (1, 2, 5):
        (output,) = load(tmp_path / "table.onnx", "onnx")(indices[:size])
        torch.testing.assert_close(output, converted(indices[:size]))


# Inputs of every form ------------------------------------------------------------------------


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("unused", torch.zeros(1))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.fc(x) + (0 if bias is None else bias)
        result = {"logits": logits, "best": logits.argmax(1)}
        return result if labels is None else {**result, "loss": (logits[:, 0] - labels).mean()}


@pytest.mark.parametrize("format", FORMATS)
def test_a_mapping_goes_by_name_and_without_labels(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": VECTORS, "bias": torch.randn(4), "labels": torch.zeros(len(VECTORS))}
    model = trained(Keywords(), inputs).convert()
    result = deploy.export(model, tmp_path / f"model{SUFFIX[format]}", format, inputs)
    run = load(result.path, format)
    logits, best = run({"bias": inputs["bias"], "x": VECTORS[:3]})
    expected = model(VECTORS[:3], inputs["bias"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0.02, atol=0.02)
    assert best.dtype == expected["best"].dtype


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        logits: Tensor = self.fc(x) / temperature
        return logits


@pytest.mark.parametrize("format", FORMATS)
def test_a_number_among_the_arguments_is_fixed(format: str, tmp_path: Path) -> None:
    model = trained(Scaled(), VECTORS).convert()
    path = tmp_path / f"model{SUFFIX[format]}"
    deploy.export(model, path, format, {"x": VECTORS, "temperature": 2.0})
    run = deploy.load_exported(path, int8=False)
    expected = model(VECTORS, 2.0)
    if format == "torch":
        torch.testing.assert_close(run(x=VECTORS, temperature=2.0), expected)
        return
    torch.testing.assert_close(run(VECTORS), expected, rtol=0.02, atol=0.02)
    with pytest.raises(ConfigError, match=r"got 3\.0 as temperature"):
        run(VECTORS, temperature=3.0)


class Tokens(nn.Module):
    """Takes what a tokenizer gives, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kind, self.fc = nn.Embedding(9, 8), nn.Embedding(2, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor) -> Tensor:
        output: Tensor = self.fc(self.embed(ids) + self.kind(kinds)) * mask.unsqueeze(-1)
        return output


def test_what_was_exported_by_name_is_called_by_position_as_the_model_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, kinds, mask = torch.randint(9, (6, 5)), torch.randint(2, (6, 5)), torch.ones(6, 5)
    mask[:, 3:] = 0
    batch = {"ids": ids, "kinds": kinds, "mask": mask.long()}
    model = trained(Tokens(), batch).convert()
    deploy.export(model, tmp_path / "model.onnx", "onnx", batch)
    run = deploy.load_exported(tmp_path / "model.onnx", int8=False)
    expected = model(**batch)
    assert torch.equal(model(ids, mask.long(), kinds), expected)
    torch.testing.assert_close(run(ids, mask.long(), kinds), run(**batch), rtol=0, atol=0)
    torch.testing.assert_close(run(**batch), expected, rtol=0.02, atol=0.02)


class TwoTowers(nn.Module):
    """Similarity of every image with every text."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, img: Tensor, txt: Tensor) -> Tensor:
        return cast(Tensor, self.images(img)) @ self.texts(txt).T


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_one_batch_size_have_to_keep_it(format: str, tmp_path: Path) -> None:
    inputs = VECTORS[:5], torch.randn(5, 3)
    model, path = trained(TwoTowers(), inputs).convert(), tmp_path / f"model{SUFFIX[format]}"
    deploy.export(model, path, format, inputs)
    run = deploy.load_exported(path, int8=False)
    assert run(VECTORS[:3], inputs[1][:3]).shape == (3, 3)
    message = "must hold equally many samples, as in the examples .* got 1 and 4"
    with pytest.raises(ConfigError, match=message):
        run(VECTORS[:1], inputs[1][:4])
    deploy.export(model, path, format, (VECTORS[:5], inputs[1][:4]))
    run = deploy.load_exported(path, int8=False)
    expected = model(VECTORS[:1], inputs[1][:4])
    torch.testing.assert_close(run(VECTORS[:1], inputs[1][:4]), expected, rtol=0.02, atol=0.02)


class Graph(nn.Module):
    """Features of nodes (N, 6), and edges (2, E) from one node to another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = self.fc(x)[source]
        return torch.zeros(x.shape[0], 4).index_add(0, target, messages)


EDGES = torch.tensor([[0, 1, 2, 4], [1, 2, 0, 0]])


def test_examples_that_are_no_samples_are_told_from_wrong_ones(tmp_path: Path) -> None:
    model = trained(Graph(), (VECTORS[:5], EDGES)).convert()
    message = r"but not the single sample cut from them \(IndexError.*dimension 0 of 'x' was taken"
    with pytest.raises(ConfigError, match=message):
        deploy.export(model, tmp_path / "model", "torch", (VECTORS[:5], EDGES))
    both = VECTORS[:2], EDGES % 2
    with pytest.raises(ConfigError, match=r"dimension 0 of 'x', 'edges' .*dynamic_batch=False"):
        deploy.export(model, tmp_path / "model", "torch", both)
    one = VECTORS[:1], torch.zeros(2, 3, dtype=torch.long), torch.ones(1)
    with pytest.raises(ConfigError, match="cannot be called with the example inputs"):
        deploy.export(model, tmp_path / "model", "torch", one)
    assert list(tmp_path.iterdir()) == []


class OneSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(x.view(1, 6)))


def test_one_sample_that_cannot_be_two_is_said(tmp_path: Path) -> None:
    model = trained(OneSample(), VECTORS[:1]).convert()
    with pytest.raises(ConfigError, match=r"but not their one sample twice .*dimension 0 of 'x'"):
        deploy.export(model, tmp_path / "model", "torch", VECTORS[:1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("nodes", [1, 5])
def test_sizes_may_be_fixed(nodes: int, format: str, tmp_path: Path) -> None:
    inputs = VECTORS[:nodes], EDGES % nodes
    manager = trained(Graph(), (VECTORS, EDGES))
    path = tmp_path / f"model{SUFFIX[format]}"
    result = manager.export(path, format, inputs, dynamic_batch=False)
    assert result.output_error is not None
    run = deploy.load_exported(path, int8=False)
    expected = manager.convert()(*inputs)
    torch.testing.assert_close(run(*inputs), expected, rtol=0.02, atol=0.02)
    with pytest.raises(ConfigError, match=rf"\({nodes}, 6\).* got .*\(7, 6\)"):
        run(VECTORS[:7], inputs[1])


@pytest.mark.parametrize("format", FORMATS)
def test_images_of_a_list_are_no_batch(format: str, tmp_path: Path) -> None:
    class Listed(toys.ConvNet):
        def forward(self, images: Any) -> Tensor:  # type: ignore[override]  # a list, where ConvNet takes a tensor
            output: Tensor = super().forward(torch.stack(images))
            return output

    images = list(IMAGES[:3])
    model, path = trained(Listed(), (images,)).convert(), tmp_path / f"model{SUFFIX[format]}"
    deploy.export(model, path, format, (images,), dynamic_batch=False)
    output = deploy.load_exported(path, int8=False)(images)
    torch.testing.assert_close(output, model(images), rtol=0.02, atol=0.02)


class Counting(nn.Module):
    """Adds how often it was called."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.steps += 1
        return cast(Tensor, self.fc(input)) + self.steps


def test_a_model_that_remembers_is_exported_where_files_can(tmp_path: Path) -> None:
    model = trained(Counting(), VECTORS).convert()
    with pytest.raises(NotExportableError, match=r"changes steps in its forward pass.*'torch'"):
        deploy.export(model, tmp_path / "model.onnx", "onnx", VECTORS)
    deploy.export(model, tmp_path / "model.pt2", "torch", VECTORS)
    run = deploy.load_exported(tmp_path / "model.pt2")
    for _ in range(2):
        torch.testing.assert_close(run(VECTORS), model(VECTORS))


# Refused -------------------------------------------------------------------------------------


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'onx'; did you mean 'onnx'"):
        deploy.export(mlp(), tmp_path / "model", "onx", VECTORS)
    with pytest.raises(
        ConfigError, match=r"no format 7; Valid: aot_inductor, onnx, openvino, torch\."
    ):
        deploy.export(mlp(), tmp_path / "model", 7, VECTORS)  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, package)
    message = rf"needs {package}, which the extra 'onnx' installs: .*compression-manager\[onnx\]"
    with pytest.raises(ConfigError, match=message):
        deploy.export(mlp(), tmp_path / "model.onnx", "onnx", VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_runtime_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime")
    with pytest.warns(UserWarning, match="not compared .* onnxruntime is missing") as record:
        result = deploy.export(mlp(), tmp_path / "model.onnx", "onnx", VECTORS)
    assert record[0].filename == __file__
    assert result.output_error is None
    assert "onnxruntime is missing" in str(result)
    assert result.path.is_file()


@pytest.mark.parametrize("inputs", [None, 3, torch.tensor(1.0), torch.empty(0, 6), {}])
def test_inputs_without_a_sample_are_refused(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        deploy.export(mlp(), tmp_path / "model", "torch", inputs)


def test_inputs_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be called with the example inputs"):
        deploy.export(mlp(), tmp_path / "model", "torch", torch.randn(3, 7))


def test_a_model_of_training_is_refused(tmp_path: Path) -> None:
    manager = prepared(toys.mlp(), [VECTORS])
    with pytest.raises(ConfigError, match=r"layer '0' is still that of training.*convert\(\)"):
        deploy.export(manager.model, tmp_path / "model", "torch", VECTORS)
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module, got dict"):
        deploy.export({}, tmp_path / "model", "torch", VECTORS)  # type: ignore[arg-type]


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"writes a file, and .* is something else"):
        deploy.export(mlp(), tmp_path, "torch", VECTORS)
    with pytest.raises(ConfigError, match="the path of a file, got ''"):
        deploy.export(mlp(), "", "torch", VECTORS)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(input) * (2 if input.shape[0] == 5 else 1)


class ValueDependent(FixedBatch):
    def forward(self, input: Tensor) -> Tensor:
        return self.fc(input) if input.sum() > 0 else self.fc(-input)


@pytest.mark.parametrize("kind", [FixedBatch, ValueDependent])
@pytest.mark.parametrize("format", FORMATS)
def test_a_model_without_one_graph_is_refused(
    format: str, kind: type[nn.Module], tmp_path: Path
) -> None:
    model = trained(kind(), VECTORS[:5]).convert()
    with pytest.raises(NotExportableError, match="cannot trace the model for any batch size"):
        deploy.export(model, tmp_path / f"model{SUFFIX[format]}", format, VECTORS[:5])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["openvino", "aot_inductor"])
def test_a_name_that_the_runtime_does_not_take_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"of the format {format} is named \*\.(xml|pt2), got"):
        deploy.export(mlp(), tmp_path / "model.onnx", format, VECTORS)
    assert list(tmp_path.iterdir()) == []


# Failures leave nothing ----------------------------------------------------------------------


def damaged_translation(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Let the file be that of a model whose last integer weights are all zero."""
    exporter = formats.FORMATS[format]
    write = exporter.write

    def damage(program: Any, path: Path) -> None:
        program.state_dict["2.weight"].zero_()
        write(program, path)

    monkeypatch.setattr(exporter, "write", damage)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_computes_something_else_is_not_left(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{SUFFIX[format]}"
    path.write_text("the older one")
    model = mlp()
    loaded_weight = model.state_dict()["2.weight"].clone()
    damaged_translation(monkeypatch, format)
    with pytest.raises(ParityError, match=f"the {format} file at batch size .* relative error"):
        deploy.export(model, path, format, VECTORS)
    assert loaded_weight.any()
    assert path.read_text() == "the older one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_that_was_fixed_in_the_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = formats.FORMATS["torch"]
    load = exporter.load

    def fixed(path: Path, *, int8: bool) -> Any:
        run = load(path, int8=int8)
        return lambda inputs: run(inputs) if len(inputs) > 1 else run(inputs.repeat(2, 1))

    monkeypatch.setattr(exporter, "load", fixed)
    message = r"at batch size 1 returns float32 \(2, 4\) instead of float32 \(1, 4\)"
    with pytest.raises(ParityError, match=message):
        deploy.export(mlp(), tmp_path / "model", "torch", VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_runtime_does_not_take_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        formats.FORMATS["onnx"], "write", lambda program, path: path.write_bytes(b"no model")
    )
    with pytest.raises(NotExportableError, match="onnxruntime cannot load the onnx file"):
        deploy.export(mlp(), tmp_path / "model", "onnx", VECTORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floats_without_kernels_are_to_be_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    images, path = IMAGES.to(dtype), tmp_path / "model.onnx"
    model = trained(toys.ConvNet().to(dtype), images).convert()
    name = str(dtype).removeprefix("torch.")
    message = f"Conv.*; the model computes in {name}, convert it to float32 first"
    with pytest.raises(NotExportableError, match=message):
        deploy.export(model, path, "onnx", images)
    assert list(tmp_path.iterdir()) == []
    deploy.export(model.float(), path, "onnx", IMAGES)


def test_float16_is_exported(tmp_path: Path) -> None:
    vectors = VECTORS.half()
    model = trained(toys.mlp().half(), vectors).convert()
    result = deploy.export(model, tmp_path / "model.onnx", "onnx", vectors)
    assert deploy.load_exported(result.path, int8=False)(vectors).dtype is torch.float16


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True, proj_size=4)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.lstm(x)[0]
        return outputs


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_a_runtime_does_not_run_is_told_with_its_reason(tmp_path: Path) -> None:
    sequences = torch.randn(3, 5, 6)
    model = trained(Projected(), sequences).convert()
    with pytest.raises(NotExportableError, match=r"at batch size 3 fails.* running LSTM node"):
        deploy.export(model, tmp_path / "model.onnx", "onnx", sequences)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_translation_is_not_exportable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "onnx_translation_table", dict)
    with pytest.raises(NotExportableError, match="cannot be written as onnx"):
        deploy.export(mlp(), tmp_path / "model", "onnx", VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        deploy.export(mlp(), tmp_path / "file" / "model", "torch", VECTORS)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


# The manager ---------------------------------------------------------------------------------


def test_the_manager_exports_what_it_converted_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    manager = trained(toys.mlp(), VECTORS)
    int8 = manager.convert()
    with torch.no_grad():
        manager.model[0].weight.zero_()
    with reference_arithmetic():  # which is what an exported program computes
        result = manager.export(tmp_path / "model.pt2", "torch")  # inputs: those of training
        assert result.output_error == 0
        assert torch.equal(torch.export.load(result.path).module()(VECTORS), int8(VECTORS))
    manager.close()
    manager.export(str(tmp_path / "closed.pt2"), format="torch", example_inputs=VECTORS[:2])


def test_the_manager_converts_if_need_be(tmp_path: Path) -> None:
    manager = trained(toys.mlp(), VECTORS)
    result = manager.export(tmp_path / "model.pt2", "torch", VECTORS)
    program = torch.export.load(result.path)
    with reference_arithmetic():
        assert torch.equal(program.module()(VECTORS), manager.convert()(VECTORS))
    manager.close()
    fresh = trained(toys.mlp(), VECTORS)
    fresh.close()
    with pytest.raises(LifecycleError):
        fresh.export(tmp_path / "model.pt2", "torch", VECTORS)


def test_the_manager_needs_inputs_and_a_known_format(tmp_path: Path) -> None:
    manager = prepare_compression(toys.mlp(), [QATConfig()])
    with pytest.raises(ConfigError, match=r"export\(\) needs an input"):
        manager.export(tmp_path / "model", "torch")
    with pytest.raises(ConfigError, match="no format 'pt2'"):
        manager.export(tmp_path / "model", "pt2")


def test_a_loaded_model_is_exported(tmp_path: Path) -> None:
    manager = trained(toys.ConvNet(), IMAGES)
    manager.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", toys.ConvNet())
    result = deploy.export(loaded, tmp_path / "model.pt2", "torch", IMAGES)
    program = torch.export.load(result.path)
    with reference_arithmetic():
        assert torch.equal(program.module()(IMAGES), manager.convert()(IMAGES))
