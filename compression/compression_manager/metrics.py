"""Named scalars, histograms and images that plugins publish and other plugins show.

Publishers write to a `MetricBoard` and know no consumer; consumers implement the hook
`consume_metrics` and know no publisher. The manager delivers what was published at the end
of every step, evaluation, epoch and training, after all plugins have seen the event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compression_manager.errors import ConfigError

MetricKind = Literal["scalar", "histogram", "image"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One published value.

    Attributes:
        name: slash-separated name, for example `loss/total` or `quantization/conv1/scale`.
        kind: what the value is.
        value: scalar: a float or a detached 0-dimensional tensor; histogram: a detached
            tensor of any shape; image: a float tensor (channels, height, width) in [0, 1].
        global_step: number of optimizer steps completed when it was published.
    """

    name: str
    kind: MetricKind
    value: float | Tensor
    global_step: int

    def as_float(self) -> float:
        """Return a scalar's value as a Python float (synchronises with the device)."""
        return float(self.value)


class MetricBoard:
    """Collects metrics until the manager delivers them."""

    def __init__(self) -> None:
        self.global_step = 0
        self._pending: list[Metric] = []

    def scalar(self, name: str, value: float | Tensor) -> None:
        """Publish one number; a tensor with a single element is copied.

        Raises:
            ConfigError: a tensor has several elements.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ConfigError(
                    f"metric '{name}' must be one number, got a tensor of shape "
                    f"{tuple(value.shape)}; reduce it, or publish a histogram."
                )
            # Losses and scales are changed in place later on. Reading an accelerator would wait.
            is_on_cpu = value.device.type == "cpu"
            value = value.item() if is_on_cpu else value.detach().reshape(()).clone()
        self._publish(name, "scalar", value)

    def histogram(self, name: str, value: Tensor) -> None:
        """Publish a distribution: a tensor of any shape."""
        self._publish(name, "histogram", value.detach())

    def image(self, name: str, value: Tensor) -> None:
        """Publish an image: float (channels, height, width) in [0, 1]."""
        self._publish(name, "image", value.detach())

    def drain(self) -> list[Metric]:
        """Return what was published since the last call, oldest first."""
        pending, self._pending = self._pending, []
        return pending

    def _publish(self, name: str, kind: MetricKind, value: float | Tensor) -> None:
        self._pending.append(Metric(name, kind, value, self.global_step))


def quantizer_tag(layer: str, part: str, role: str) -> str:
    """Return what the names of a fake quantizer's metrics begin with.

    Args:
        layer: name of the layer; empty for the model itself.
        part: of the layer; empty if it has one only.
        role: "weight" or "input".
    """
    return "/".join(filter(None, ("quantization", layer, part, role)))
