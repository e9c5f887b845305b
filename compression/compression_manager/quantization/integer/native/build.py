"""Compiles the C++ files beside this one.

Run as a program of its own, so that it can be stopped when it takes too long; it therefore imports
nothing of the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

NAME = "passes"
FOLDER = Path(__file__).parent

# By torch's own name of what the processor can do, which is part of the library's name: with
# -march=native, a home directory shared by two machines would hold code that one cannot run.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def sources() -> list[Path]:
    """Return every file that the library depends on, this one included."""
    return sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), Path(__file__)])


def compiler_flags(capability: str) -> list[str]:
    """Return the compiler's flags for one of `torch.backends.cpu.get_cpu_capability`'s names.

    None changes what is computed: there is no -ffast-math, and products and sums are not fused.
    """
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    if capability in _INSTRUCTIONS:
        flags += [*_INSTRUCTIONS[capability], f"-DCPU_CAPABILITY={capability}"]
        flags.append(f"-DCPU_CAPABILITY_{capability}")
    return flags


def main(folder: str) -> int:
    """Write the library into `folder`; print what the compiler said if it fails."""
    from torch.utils import cpp_extension  # slow, and not needed by importers

    try:
        cpp_extension.load(
            name=NAME,
            sources=[str(path) for path in sources() if path.suffix == ".cpp"],
            extra_cflags=compiler_flags(torch.backends.cpu.get_cpu_capability()),
            # OpenMP itself is not linked: torch's is found, while a second one would have threads
            # of its own. What is not found is to fail now rather than at the first call.
            extra_ldflags=["-Wl,-z,now"],
            build_directory=folder,
            is_python_module=False,
        )
    except Exception as error:  # the compiler's message is in it, whatever its type
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
