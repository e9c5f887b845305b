"""`export` refuses with a reason what cannot be, and leaves nothing of a failure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy
from compression_manager.deploy import formats
from compression_manager.errors import (
    CheckpointError,
    ConfigError,
    NotExportableError,
    ParityError,
)
from compression_manager.integrations import onnx_export
from exported_files import FORMATS, IMAGES, SUFFIX, VECTORS, mlp
from quantization_reference import prepared, trained


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let these packages seem missing."""
    monkeypatch.setattr(
        deploy.packages,
        "find_spec",
        lambda name: None if name in packages else importlib.util.find_spec(name),
    )


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'onx'; did you mean 'onnx'"):
        deploy.export(mlp(), tmp_path / "model", "onx", VECTORS)
    with pytest.raises(
        ConfigError, match=r"no format 7; Valid: aot_inductor, onnx, openvino, torch\."
    ):
        deploy.export(mlp(), tmp_path / "model", 7, VECTORS)


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
        deploy.export({}, tmp_path / "model", "torch", VECTORS)


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
