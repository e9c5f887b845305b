"""`export`: what is written, checked before the file is left in place."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy, prepare_compression
from compression_manager.deploy import formats
from compression_manager.errors import (
    ConfigError,
    LifecycleError,
)
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_plugins import QATConfig
from exported_files import FORMATS, IMAGES, SUFFIX, VECTORS, conv_net, load, mlp
from quantization_reference import prepared, trained


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
