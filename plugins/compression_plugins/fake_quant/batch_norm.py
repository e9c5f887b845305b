"""Finding convolutions whose output goes to one BatchNorm and nowhere else.

One forward pass is observed: which tensors feed what, functional uses included. Neither names
nor tracing are needed, so that the model's control flow is free.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compression_manager.model_call import tensors_in
from compression_manager.model_hooks import ModelHooks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class PairFinder(TorchFunctionMode):
    """A context that observes the forward pass run inside it; then `pairs()` answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._hooks = ModelHooks()
        self._outputs: dict[int, tuple[str, Tensor]] = {}
        self._calls: dict[str, int] = {}
        self._consumers: dict[int, int] = {}
        self._inputs: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            if isinstance(module, _CONVOLUTIONS):
                self._hooks.add_forward_hook(module, self._on_convolution(name))
            elif isinstance(module, _BATCH_NORMS):
                self._hooks.add_forward_pre_hook(module, self._on_batch_norm(name))
        super().__enter__()  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # untyped in torch
        self._hooks.remove_all()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # A call that returns no tensor (a shape, a flag) does not use the values.
        if any(True for _ in tensors_in(result)):
            for tensor in tensors_in((args, kwargs)):
                if id(tensor) in self._outputs:
                    self._consumers[id(tensor)] = self._consumers.get(id(tensor), 0) + 1
        return result

    def pairs(self, model_output: Any) -> dict[str, str]:
        """Return BatchNorm name -> name of the convolution that feeds only it.

        Args:
            model_output: what the observed forward pass returned; a convolution whose output
                is part of it has another consumer.
        """
        returned = {id(tensor) for tensor in tensors_in(model_output)}
        found: dict[str, str] = {}
        for batch_norm, tensor in self._inputs.items():
            key = id(tensor)
            if key not in self._outputs or key in returned:
                continue
            convolution = self._outputs[key][0]
            once = self._calls[convolution] == self._calls[batch_norm] == 1
            if once and self._consumers.get(key) == 1:
                found[batch_norm] = convolution
        return found

    def _on_convolution(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            # Holding the tensor keeps its id from being used again during this pass.
            self._outputs[id(output)] = (name, output)

        return hook

    def _on_batch_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            self._inputs[name] = args[0]

        return hook


def observe_next_forward(
    model: nn.Module, hooks: ModelHooks, found: Callable[[dict[str, str]], object]
) -> None:
    """Observe the next forward pass of `model`, whoever runs it, and hand over its pairs."""
    finder = PairFinder(model)

    def begin(module: nn.Module, args: Any) -> None:
        begin_handle.remove()
        finder.__enter__()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        end_handle.remove()
        finder.__exit__(None, None, None)
        if output is not None:
            found(finder.pairs(output))

    begin_handle = hooks.add_forward_pre_hook(model, begin)
    # Also called when forward raises, so that the observation ends in any case.
    end_handle = hooks.add_forward_hook(model, end, always_call=True)
