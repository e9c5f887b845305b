"""What a file format has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.export import ExportedProgram

Runner = Callable[[Any], list[Tensor]]
"""Runs an exported file: example inputs -> the tensors of its outputs, in order."""


class ExportFormat(ABC):
    """One file format.

    Attributes:
        name: what users call it.
        packages: optional packages without which nothing is written.
        extra: extra of this distribution that installs `packages`.
        operators: whether the program that it writes has the operators `compression_manager::...`
            where the model quantizes; else it has the formula that they stand for.
        runtime: package that runs a file, or None if torch itself does.
        tolerance: relative root mean square error of the outputs that its rounding allows.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    operators: ClassVar[bool] = True
    runtime: ClassVar[str | None] = None
    tolerance: ClassVar[float]

    @abstractmethod
    def serialize(self, program: ExportedProgram) -> bytes:
        """Return the content of the file.

        Args:
            program: the traced model; may be changed.
        """

    @abstractmethod
    def load(self, path: Path) -> Runner:
        """Return what runs the file; only called if `runtime` is installed."""
