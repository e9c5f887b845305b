"""The record of one layer that a conversion replaced."""

from __future__ import annotations

from dataclasses import dataclass

from compression_manager.deploy.layers.base import ConvertedLayer


@dataclass(frozen=True)
class Replacement:
    """One layer that was replaced.

    Attributes:
        name: qualified name of the layer.
        layer: what stands there now.
        absorbed: names of the modules that the layer also computes; they became Identity.
    """

    name: str
    layer: ConvertedLayer
    absorbed: tuple[str, ...] = ()

    @property
    def output_of(self) -> str:
        """Name of the module whose output in training the layer computes."""
        return self.absorbed[-1] if self.absorbed else self.name
