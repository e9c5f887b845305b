"""What authors of plugins test with: a contract, a recording plugin, tiny models and loops.

Needs pytest: `pip install "compression-manager[testing]"`.
"""

try:
    import pytest  # noqa: F401 (says what is missing before a submodule does)
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "compression_manager.testing needs pytest, which is not installed; install the extra "
        "'testing': pip install 'compression-manager[testing]'.",
        name="pytest",
    ) from _error

from compression_manager.testing.comparison import assert_identical, differences
from compression_manager.testing.contract import PluginContract
from compression_manager.testing.data import images, loader, tokens, vectors
from compression_manager.testing.loops import (
    train,
    train_with_hooks,
    train_without_optional_hooks,
)
from compression_manager.testing.models import (
    tiny_classifier,
    tiny_convolution_network,
    tiny_transformer,
)
from compression_manager.testing.recording import (
    Event,
    RecordingConfig,
    RecordingPlugin,
)

__all__ = [
    "PluginContract",
    "RecordingPlugin",
    "RecordingConfig",
    "Event",
    "tiny_classifier",
    "tiny_convolution_network",
    "tiny_transformer",
    "vectors",
    "images",
    "tokens",
    "loader",
    "train",
    "train_with_hooks",
    "train_without_optional_hooks",
    "differences",
    "assert_identical",
]
