"""Settings of layers that show in no tensor: a file loads only where they are the same."""

import json
import shutil

import pytest
import torch
from torch import nn

from compression_manager import deploy
from compression_manager.deploy import storage
from compression_manager.errors import CheckpointMismatchError
from compression_manager.state import atomic_directory
from quantization_reference import trained


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "other", "example", "message"),
    [
        (
            lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            lambda: nn.Conv2d(2, 4, 3, padding=1),
            randn(3, 2, 6, 6),
            r"was a Conv2d with padding_mode='circular'; here it has padding_mode='zeros'",
        ),
        (
            lambda: nn.Conv2d(2, 4, 3, stride=2),
            lambda: nn.Conv2d(2, 4, 3),
            randn(3, 2, 6, 6),
            r"stride=\[2, 2\]; here it has stride=\[1, 1\]",
        ),
        (
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            lambda: nn.MultiheadAttention(8, 4, batch_first=True),
            (randn(2, 3, 8),) * 3,
            "num_heads=2; here it has num_heads=4",
        ),
        (
            lambda: nn.RNN(6, 5, nonlinearity="relu"),
            lambda: nn.RNN(6, 5),
            randn(7, 3, 6),
            "mode='RNN_RELU'; here it has mode='RNN_TANH'",
        ),
        (
            lambda: nn.EmbeddingBag(12, 6, padding_idx=3),
            lambda: nn.EmbeddingBag(12, 6),
            torch.arange(8).reshape(2, 4),
            "padding_idx=3; here it has padding_idx=None",
        ),
    ],
)
def test_a_layer_with_other_settings_is_refused(build, other, example, message, tmp_path):
    """The tensors fit: without the settings the loaded model would answer wrongly."""
    trained(build(), example).save_converted(tmp_path / "int8")
    model = other()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(CheckpointMismatchError, match=message):
        deploy.load(tmp_path / "int8", model)
    assert [type(module) for module in model.modules()] == classes
    deploy.load(tmp_path / "int8", build())


def test_files_without_settings_are_loaded_as_before(tmp_path):
    trained(nn.RNN(6, 5), randn(7, 3, 6)).save_converted(tmp_path / "int8")
    document = json.loads((tmp_path / "int8" / "quantization.json").read_text())
    del document["layers"][0]["settings"]
    with atomic_directory(
        tmp_path / "old", format_name=storage.FORMAT_NAME, version=storage.FORMAT_VERSION
    ) as temporary:
        shutil.copy(tmp_path / "int8" / "model.safetensors", temporary)
        (temporary / "quantization.json").write_text(json.dumps(document))
    deploy.load(tmp_path / "old", nn.RNN(6, 5, nonlinearity="relu"))
