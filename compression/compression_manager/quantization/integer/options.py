"""What the user chooses: how layers multiply, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Forward = Literal["auto", "integer", "fake"]
Backward = Literal["float32", "bfloat16x3", "bfloat16"]

FORWARD: tuple[Forward, ...] = ("auto", "integer", "fake")
BACKWARD: tuple[Backward, ...] = ("float32", "bfloat16x3", "bfloat16")
# Backward in bfloat16 -> how many numbers of that type stand for one gradient.
PIECES: dict[Backward, int] = {"bfloat16": 1, "bfloat16x3": 3}


@dataclass(frozen=True)
class ProductOptions:
    """How quantization-aware layers multiply.

    Attributes:
        forward: "integer" wherever integers can be multiplied exactly; "auto" in evaluation, and
            in training where that is fast as well; "fake" never, but with the functions of
            `arithmetic`, which can be differentiated twice.
        backward: type of the products that give the gradients.
    """

    forward: Forward = "fake"
    backward: Backward = "float32"
