"""Converted models in torch's compiler, with 8-bit kernels: by torch.compile or by AOTInductor.

Only this module touches the compiler's settings and counters.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch._inductor
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters
from torch.export import ExportedProgram

from compression_manager.integrations.inductor_graph import to_inductor_operators
from compression_manager.models.calling import tensors_in
from compression_manager.tracing.compiled_inputs import (
    called_as_examples,
    described_examples,
)
from compression_manager.tracing.program import (
    batch_shapes,
    batch_size,
    has_open_batch,
    is_batch,
)

# Under which name a package says what its inputs are.
_INPUTS = "inputs"
_MATCHES = ("qlinear_weight_prepack_matcher_count", "qconv_weight_prepack_matcher_count")


@functools.cache
def int8_kernels_are_exact() -> bool:
    """Return whether oneDNN's product of uint8 and int8 is exact on this processor.

    Without VNNI, pairs of products are added in 16 bits, which saturate.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    rows, columns = 16, 64
    input = torch.full((rows, columns), 255, dtype=torch.uint8)
    weight = torch.full((rows, columns), 127, dtype=torch.int8)
    scale, zero = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    product = torch.ops.onednn.qlinear_pointwise(
        input, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((product == 255 * 127 * columns).all())


@contextmanager
def compiling() -> Iterator[None]:
    """Let the compiler freeze weights into the code within a block, as the kernels need it."""
    # Both dynamo and Inductor read the setting, so that an option of torch.compile is too late.
    with torch.no_grad(), torch._inductor.config.patch(freezing=True), warnings.catch_warnings():
        # The compiler calls what torch itself has deprecated.
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


@contextmanager
def counting_kernels() -> Iterator[Callable[[], int]]:
    """Yield a function that says how many 8-bit kernels were compiled within the block so far."""
    before = _count()
    yield lambda: _count() - before


def open_batch(inputs: Any) -> Any:
    """Let the compiler keep the batch size of `inputs` open; return them.

    torch takes a size of one for a constant.
    """
    size = batch_size(inputs)
    for tensor in tensors_in(inputs):
        if size > 1 and is_batch(tensor, size):
            torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


def compile_program(program: ExportedProgram) -> tuple[Callable[..., Any], int]:
    """Return the program's module, to be compiled by its first call within `compiling`.

    Args:
        program: traced with the view `eight bits` or `formulas`.

    Returns:
        What is called as the model is, and the number of its layers with 8-bit weights.
    """
    module, layers = to_inductor_operators(program)
    with compiling():
        return torch.compile(module), layers


def write_package(program: ExportedProgram, path: Path) -> None:
    """Compile a program for this processor.

    Args:
        program: traced with the view `eight bits` or `formulas`.
        path: ends in .pt2.
    """
    module, layers = to_inductor_operators(program)
    with compiling():
        if layers:
            program = _trace_again(program, module)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                "freezing": True,
                "aot_inductor.metadata": {_INPUTS: described_examples(program)},
            },
        )


def load_package(path: Path) -> Callable[..., Any]:
    """Return what is called as the model is.

    The code takes for granted that inputs are what the examples were, and asks nobody.
    """
    package = torch._inductor.aoti_load_package(str(path))
    run = cast(Callable[..., Any], package)
    description = package.get_metadata().get(_INPUTS)
    return run if description is None else called_as_examples(run, description)


def _trace_again(program: ExportedProgram, module: nn.Module) -> ExportedProgram:
    """Return the program of a module that is called as `program` is."""
    args, kwargs = program.example_inputs or ((), {})
    shapes = batch_shapes(args, kwargs) if has_open_batch(program) else None
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)


def _count() -> int:
    return sum(counters["inductor"][name] for name in _MATCHES)
