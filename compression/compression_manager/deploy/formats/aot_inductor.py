"""A package of native code, compiled by AOTInductor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from compression_manager.deploy.formats.base import ExportFormat
from compression_manager.deploy.parity import MODEL_TOLERANCE
from compression_manager.quantization.exporting import View


class AotInductorFormat(ExportFormat):
    """One .pt2 file for processors like this one, which `torch._inductor.aoti_load_package` reads.

    The weights are compiled in, for 8-bit kernels where this processor's are exact, else as
    float32. Sums run in another order than the converted model's.
    """

    name = "aot_inductor"
    suffix = ".pt2"
    tolerance = MODEL_TOLERANCE

    # The compiler is imported when it is needed.

    @property
    def view(self) -> View:
        """Operators that become 8-bit kernels, or formulas where these kernels overflow."""
        from compression_manager.integrations.inductor import int8_kernels_are_exact

        return "eight bits" if int8_kernels_are_exact() else "formulas"

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Compile the program; takes about as long as torch.compile."""
        from compression_manager.integrations.inductor import write_package

        write_package(program, path)

    def load(self, path: Path, *, int8: bool) -> Callable[..., Any]:
        """Return what runs the package, on the device it was compiled for."""
        from compression_manager.integrations.inductor import load_package

        return load_package(path)
