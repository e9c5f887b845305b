"""`deploy.load` while the directory changes, and what it leaves behind when it fails."""

import pytest
import safetensors.torch
import torch
from torch import nn

import toys
from compression_manager import deploy
from compression_manager.errors import CheckpointError, CheckpointMismatchError
from compression_manager.quantization import QuantizationScheme
from compression_manager.state import directory
from quantization_reference import trained

VECTORS = toys.vectors().tensors[0]
# Layers that are described in other words, with tensors of the same names and sizes.
SCHEMES = (
    QuantizationScheme(signed=False, symmetric=False),
    QuantizationScheme(symmetric=False),
)


def test_what_replaces_the_directory_while_it_is_read_is_loaded_whole(tmp_path, monkeypatch):
    """The tensors of the one with the layers of the other would be a third model."""
    torch.manual_seed(0)
    older, newer = (trained(toys.mlp(), VECTORS, activation=scheme) for scheme in SCHEMES)
    older.save_converted(tmp_path / "int8")
    load_file, calls = safetensors.torch.load_file, []

    def replace_meanwhile(path):
        tensors = load_file(path)
        calls.append(path)
        if len(calls) == 1:
            newer.save_converted(tmp_path / "int8")
        return tensors

    monkeypatch.setattr(safetensors.torch, "load_file", replace_meanwhile)
    loaded = deploy.load(tmp_path / "int8", toys.mlp())
    assert len(calls) == 2
    assert torch.equal(loaded(VECTORS), newer.convert()(VECTORS))


def test_a_directory_that_is_replaced_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "_PAUSE", 0.0)
    trained(toys.mlp(), VECTORS).save_converted(tmp_path / "int8")

    def replace(path):
        trained(toys.mlp(), VECTORS).save_converted(tmp_path / "int8")
        raise FileNotFoundError(path)

    monkeypatch.setattr(safetensors.torch, "load_file", replace)
    with pytest.raises(CheckpointError, match="is replaced again and again while it is read"):
        deploy.load(tmp_path / "int8", toys.mlp())


class Extra(nn.Identity):
    """Has more in its state than tensors."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_a_model_whose_state_is_not_all_tensors_is_left_unchanged(tmp_path):
    trained(toys.mlp(), VECTORS).save_converted(tmp_path / "int8")
    model = nn.Sequential(*toys.mlp(), Extra())
    with pytest.raises(CheckpointMismatchError, match=r"_extra_state' .* is a dict; only tensors"):
        deploy.load(tmp_path / "int8", model)
    assert type(model[0]) is nn.Linear
