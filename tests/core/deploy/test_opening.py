"""Exported files, called as the model is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from compression_manager import deploy
from compression_manager.errors import ConfigError
from quantization_reference import trained

VECTORS = toys.vectors().tensors[0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(toys.mlp(), VECTORS).convert()


@pytest.mark.parametrize(("format", "name"), [("onnx", "a.onnx"), ("torch", "a.anything")])
def test_a_file_is_called_as_the_model(
    format: str, name: str, model: nn.Module, tmp_path: Path
) -> None:
    deploy.export(model, tmp_path / name, format, VECTORS)
    run = deploy.load_exported(tmp_path / name, int8=False)
    assert isinstance(run, deploy.ExportedModel)
    assert (run.path, run.format) == (tmp_path / name, format)
    for size in (1, 7):
        output = run(VECTORS[:size])
        assert not output.requires_grad
        torch.testing.assert_close(output, model(VECTORS[:size]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("format", "name"), [("onnx", "a.onnx"), ("torch", "a.pt2")])
def test_other_arguments_are_refused(
    format: str, name: str, model: nn.Module, tmp_path: Path
) -> None:
    deploy.export(model, tmp_path / name, format, VECTORS)
    run = deploy.load_exported(tmp_path / name, int8=False)
    for args, kwargs in (
        ((), {}),
        (([VECTORS],), {}),
        ((VECTORS, VECTORS), {}),
        ((VECTORS,), {"mask": VECTORS}),
        ((VECTORS[:, :3],), {}),
    ):
        with pytest.raises(ConfigError, match=r"was exported|exported model takes"):
            run(*args, **kwargs)


def test_a_torch_file_without_notes_of_this_package_is_run(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(6, 4), (VECTORS,))
    torch.export.save(program, tmp_path / "a.pt2")
    run = deploy.load_exported(tmp_path / "a.pt2")
    assert torch.equal(run(VECTORS), program.module()(VECTORS))


def test_a_missing_runtime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.xml").touch()
    monkeypatch.setattr(deploy.packages, "find_spec", lambda name: None)
    message = (
        r"needs openvino, which the extra 'openvino' installs: .*compression-manager\[openvino"
    )
    with pytest.raises(ConfigError, match=message):
        deploy.load_exported(tmp_path / "model.xml")


def test_what_is_no_exported_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        deploy.load_exported(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ConfigError, match=r"text\.onnx cannot be loaded as onnx"):
        deploy.load_exported(tmp_path / "text.onnx")
    (tmp_path / "cut.pt2").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"cut\.pt2 is no zip archive, .*; it is damaged"):
        deploy.load_exported(tmp_path / "cut.pt2")
    with pytest.raises(ConfigError, match="load_exported takes the path of a file, got None"):
        deploy.load_exported(None)  # type: ignore[arg-type]  # which is refused
