"""Recording the operations of one forward pass.

Calls of torch functions are observed rather than traced: the model runs as it always does, so
that every model that runs can be listed. What runs outside of such functions, for example in a
scripted module, is observed below, at the dispatcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from compression_manager.models.calling import call_with_examples, quiet_evaluation, tensors_in
from compression_manager.models.copying import copy_model
from compression_manager.quantization.graph.naming import Call, read_call
from compression_manager.quantization.graph.operations import Operation
from compression_manager.quantization.graph.quantizer_lines import (
    arithmetic_operation,
    quantizer_operation,
)
from compression_manager.quantization.graph.tensor_ids import TensorIds
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer
from compression_manager.quantization.tensors.changes import version_of


def record_operations(model: nn.Module, example_inputs: Any) -> tuple[list[Operation], list[int]]:
    """Return the operations that `model` runs, and the ids of what it returns.

    A copy is called in eval mode without gradients, on copies of the input tensors.

    Raises:
        ConfigError: the model does not take the inputs.
        QuantizationError: the model cannot be copied.
    """
    copied = copy_model(model, keep_user_hooks=True)
    inputs = tree_map(
        lambda value: value.detach().clone() if isinstance(value, Tensor) else value,
        example_inputs,
    )
    recorder = _Recorder(TensorIds(copied, _name_inputs(copied, inputs)))
    for module in copied.modules():
        if isinstance(module, FakeQuantizer):
            recorder.watch(module)
    with quiet_evaluation(copied), recorder.observe():
        output = call_with_examples(copied, inputs)
    ids = recorder.ids
    return ids.operations, [ids.id_of(tensor) for tensor in tensors_in(output)]


class _Recorder:
    """Adds a line for every operation that is observed from outside of another one."""

    def __init__(self, ids: TensorIds) -> None:
        self.ids = ids
        self._depth = 0

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Observe what runs within the block."""
        with ExitStack() as stack:
            stack.enter_context(reference_arithmetic())
            stack.enter_context(_Operators(self))
            stack.enter_context(_Functions(self))
            yield

    def watch(self, quantizer: FakeQuantizer) -> None:
        """List `quantizer` as one operation, whatever it computes with, even if it is off."""

        def begin(module: nn.Module, args: Any) -> None:
            self._depth += 1

        def end(module: FakeQuantizer, args: Any, output: Any) -> Tensor | None:
            self._depth -= 1
            if self._depth or not args or not isinstance(output, Tensor):
                return None
            self._depth += 1
            try:
                # Switched off, it returns its input, which others may read as it is.
                result = output.detach() if output is args[0] else output
                operation = quantizer_operation(module, args[0], self.ids)
            finally:
                self._depth -= 1
            self.ids.add(operation, result)
            return result

        quantizer.register_forward_pre_hook(begin, prepend=True)
        quantizer.register_forward_hook(end, always_call=True)

    def run(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call `function` and add its line, unless it runs within another operation."""
        if self._depth:
            return function(*args, **kwargs)
        self._depth += 1
        try:
            call = read_call(function, args, kwargs)
            versions = [version_of(tensor) for tensor in call.tensors]
            output = function(*args, **kwargs)
            self._add(function, args, kwargs, call, output, versions)
        finally:
            self._depth -= 1
        return output

    def _add(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Call,
        output: Any,
        versions: list[int],
    ) -> None:
        outputs = list(tensors_in(output))
        written = [
            tensor
            for tensor, version in zip(call.tensors, versions, strict=True)
            if version_of(tensor) != version
        ]
        if not outputs:
            outputs = written[:1]
        unchanged = [item for item in call.tensors if not _is_in(item, written)]
        outputs = [item for item in outputs if not _is_in(item, unchanged)]
        if not outputs:
            return
        if call.is_copy and len(outputs) == len(call.tensors) == 1:
            self.ids.alias(outputs[0], call.tensors[0])
            return
        quantization = arithmetic_operation(function, args, kwargs, outputs, self.ids)
        if quantization is not None:
            self.ids.add(quantization, outputs[0])
            return
        self.ids.add_call(call, outputs)


class _Functions(TorchFunctionMode):
    """Observes torch's functions, methods and operators as they are called from Python."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._recorder.run(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """Observes operators that no Python function called: those of scripted modules."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._recorder.run(func, args, kwargs or {})


def _name_inputs(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Return a name for each input tensor: that of the parameter of `forward`, or the key."""
    if isinstance(inputs, Mapping):
        named = list(inputs.items())
    else:
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        names = _parameter_names(model)
        names += [f"input_{position}" for position in range(len(names), len(values))]
        named = list(zip(names, values, strict=False))
    found = []
    for name, value in named:
        tensors = list(tensors_in(value))
        for position, tensor in enumerate(tensors):
            found.append((f"{name}[{position}]" if len(tensors) > 1 else str(name), tensor))
    return found


def _parameter_names(model: nn.Module) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [item.name for item in parameters if item.kind in positional]


def _is_in(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is item for item in tensors)
