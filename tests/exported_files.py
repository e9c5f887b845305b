"""Models to export, and files to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import toys
from compression_manager.deploy import formats
from compression_manager.models.calling import call_model, tensors_in
from quantization_reference import trained

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


def load(path: Path, format: str) -> Callable[[Any], list[Tensor]]:
    """What runs a file, and returns the tensors of its outputs."""
    run = formats.FORMATS[format].load(path, int8=False)
    return lambda inputs: list(tensors_in(call_model(run, inputs)))
