"""The kit's tiny models, data and loops, by the short names of our own tests."""

from __future__ import annotations

from compression_manager.testing import (
    assert_identical,
    images,
    loader,
    tiny_classifier,
    train,
    vectors,
)
from compression_manager.testing.models import CLASSES, ConvolutionNetwork

ConvNet = ConvolutionNetwork
mlp = tiny_classifier

__all__ = [
    "CLASSES",
    "ConvNet",
    "assert_identical",
    "images",
    "loader",
    "mlp",
    "train",
    "vectors",
]
