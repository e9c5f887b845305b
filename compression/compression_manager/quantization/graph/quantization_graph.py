"""A model's operations in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from compression_manager.configuration.checks import write_text
from compression_manager.errors import QuantizationError
from compression_manager.quantization.graph.fake_quantize_op import FakeQuantizeOp
from compression_manager.quantization.graph.operations import Operation
from compression_manager.quantization.graph.svg import draw
from compression_manager.quantization.graph.validation import validate_operations


class QuantizationGraph:
    """Operations, one per line: `str(graph)`; also a sequence of them.

    Args:
        operations: in the order in which they run.
        output_ids: numbers of the tensors that the model returns.

    Raises:
        QuantizationError: an item is no operation.
    """

    def __init__(
        self, operations: Iterable[Operation] = (), output_ids: Iterable[int] = ()
    ) -> None:
        self._operations = tuple(operations)
        for number, item in enumerate(self._operations, 1):
            if not isinstance(item, Operation):
                raise QuantizationError(
                    f"line {number} of a QuantizationGraph is {item!r}; valid are FakeQuantizeOp "
                    "and TensorOp."
                )
        self._output_ids = tuple(output_ids)

    @classmethod
    def record(cls, model: nn.Module, example_inputs: Any) -> QuantizationGraph:
        """Return what `model` runs in eval mode on `example_inputs`.

        A copy of the model is called, so that nothing of the model changes. Of a model with
        control flow the path that these inputs take is listed.

        Args:
            model: any module: float, prepared for quantization, or converted.
            example_inputs: as a loop would call it: a mapping by keyword, a tuple by position.

        Raises:
            ConfigError: the model does not take the inputs.
            QuantizationError: the model cannot be copied.
        """
        # Recording needs the deployed layers' package, which itself imports this one.
        from compression_manager.quantization.graph.recording import record_operations

        return cls(*record_operations(model, example_inputs))

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All operations."""
        return self._operations

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Numbers of the tensors that the model returns."""
        return self._output_ids

    @property
    def fake_quantize_ops(self) -> tuple[FakeQuantizeOp, ...]:
        """The fake quantizations alone."""
        return tuple(item for item in self if isinstance(item, FakeQuantizeOp))

    def validate(self) -> None:
        """Check every line by itself and against the lines before it.

        Ids are unique and defined before use; the number of inputs fits the operation; inner
        dimensions of matrix products agree; kernels fit weights and inputs of convolutions;
        reshaping preserves the number of elements; bits, scales and zero points are in range.
        Where a dimension is unknown, what depends on it is not checked.

        Raises:
            QuantizationError: names the first offending line.
        """
        validate_operations(self._operations, self._output_ids)

    def to_svg(self) -> str:
        """Return a picture of the graph as the text of an SVG file.

        Fake quantizations are orange; parameters, buffers and constants are left out. Pointing
        at a box shows its line.
        """
        return draw(self._operations, self._output_ids)

    def save_svg(self, path: str | Path) -> Path:
        """Write the picture to `path`, replacing a file that is there; return the path.

        Raises:
            ConfigError: the file cannot be written.
        """
        return write_text("save_svg", Path(path), self.to_svg())

    def __getitem__(self, index: int) -> Operation:
        return self._operations[index]

    def __len__(self) -> int:
        return len(self._operations)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._operations)

    def __str__(self) -> str:
        return "\n".join(map(str, self._operations))
