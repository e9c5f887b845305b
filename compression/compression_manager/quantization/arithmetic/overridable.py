"""Functions that a torch function mode sees as one call, as it sees torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_Parameters = ParamSpec("_Parameters")


def overridable(function: Callable[_Parameters, Tensor]) -> Callable[_Parameters, Tensor]:
    """Return `function`, offered to torch function modes and to subclasses of Tensor first.

    Without either it costs a look at its first argument, which must be a tensor.
    """

    @wraps(function)
    def offered(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Tensor:
        input = args[0] if args else next(iter(kwargs.values()))
        if has_torch_function_unary(input):
            output: Tensor = handle_torch_function(offered, (input,), *args, **kwargs)
            return output
        return function(*args, **kwargs)

    return offered
