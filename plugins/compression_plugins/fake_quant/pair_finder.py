"""Finding convolutions whose output goes to one BatchNorm and nowhere else.

One forward pass is observed: which tensors feed what, functional uses included. Neither names
nor tracing are needed, so that the model's control flow is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compression_manager.models.calling import tensors_in
from compression_manager.models.hooks import ModelHooks

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Exact classes: a subclass may do more than normalize.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class ObservedPass:
    """What one forward pass showed.

    Attributes:
        pairs: BatchNorm name -> name of the convolution that feeds only it.
        called: names of the convolutions and BatchNorms that were called.
    """

    pairs: dict[str, str]
    called: frozenset[str]


class PairFinder(TorchDispatchMode):
    """A context that observes the forward pass run inside it; then `observed()` answers.

    It watches the operations themselves, below autograd, because functions of Python alone
    would miss scripted modules and custom autograd functions.
    """

    # Such as torch.cond, whose operands are read as those of any operation.
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._model = model
        self._hooks = ModelHooks()
        self.active = False
        self._forget()

    def _forget(self) -> None:
        # Holding a tensor keeps its id from being used again during the pass.
        self._outputs: dict[int, tuple[str, Tensor]] = {}
        self._inputs: dict[str, list[int]] = {}
        self._calls: dict[str, int] = {}
        self._used_elsewhere: set[int] = set()
        self._running: str | None = None

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            if isinstance(module, _CONVOLUTIONS):
                # First of all hooks: what another hook does with the output is a use of it.
                self._hooks.add_forward_hook(module, self._after_convolution(name), prepend=True)
            elif type(module) in _BATCH_NORMS:
                self._hooks.add_forward_pre_hook(
                    module, self._before_batch_norm(name), with_kwargs=True
                )
                self._hooks.add_forward_hook(module, self._after_batch_norm, prepend=True)
        super().__enter__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.active = False
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # untyped in torch
        self._hooks.remove_all()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._running is None and self._outputs:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and id(value) in self._outputs:
                    self._used_elsewhere.add(id(value))
        return func(*args, **kwargs)

    def observed(self, model_output: Any) -> ObservedPass:
        """Return what the pass showed, and forget it.

        Args:
            model_output: what the observed forward pass returned; a convolution whose output
                is part of it has another consumer.
        """
        used = self._used_elsewhere | {id(tensor) for tensor in tensors_in(model_output)}
        readers = Counter(key for keys in self._inputs.values() for key in keys)
        pairs: dict[str, str] = {}
        for batch_norm, keys in self._inputs.items():
            if any(key not in self._outputs or key in used or readers[key] > 1 for key in keys):
                continue
            feeding = {self._outputs[key][0] for key in keys}
            # A layer that is called several times, on both images of a pair say, stays one.
            if len(feeding) == 1 and self._calls[min(feeding)] == self._calls[batch_norm]:
                pairs[batch_norm] = feeding.pop()
        result = ObservedPass(pairs, frozenset(self._calls))
        self._forget()
        return result

    def abandon(self) -> None:
        """End an observation that came to nothing."""
        self.__exit__(None, None, None)
        self._forget()

    def _after_convolution(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            # Without a batch dimension the channels are not where BatchNorm looks for them.
            if output.dim() == len(cast(tuple[int, ...], module.kernel_size)) + 2:
                self._outputs[id(output)] = (name, output)

        return hook

    def _before_batch_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            input = args[0] if args else kwargs["input"]
            self._inputs.setdefault(name, []).append(id(input))
            self._running = name

        return hook

    def _after_batch_norm(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._running = None
