"""What a file format has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch.export import ExportedProgram

from compression_manager.quantization.exporting import View


class ExportFormat(ABC):
    """One file format.

    Attributes:
        name: what users call it.
        suffix: end of the file's name that its runtime insists on, or None.
        packages: optional packages without which nothing is written.
        extra: extra of this distribution that installs `packages`.
        runtime: package that runs a file, or None if torch itself does.
        runtime_extra: extra that installs `runtime`.
        tolerance: relative root mean square error of the outputs that its rounding allows.
    """

    name: ClassVar[str]
    suffix: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    runtime: ClassVar[str | None] = None
    runtime_extra: ClassVar[str | None] = None
    tolerance: ClassVar[float]

    @property
    def view(self) -> View:
        """What stands for the arithmetic of quantization in the program that it writes."""
        return "operators"

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write the file `path`, and others beside it that differ from it in the suffix.

        Args:
            program: the traced model; may be changed.
            path: in a folder of its own; does not exist.
        """

    @abstractmethod
    def load(self, path: Path, *, int8: bool) -> Callable[..., Any]:
        """Return what is called as the model is; only called if `runtime` is installed.

        Args:
            path: the file.
            int8: whether the runtime may use its 8-bit kernels, which are wrong on some processors;
                of no meaning where the file itself says how it is computed.
        """
