"""Ways to run a converted model on this machine."""

from __future__ import annotations

import functools
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from compression_manager.deploy.compiling import compile_now, traced_for_compiler
from compression_manager.deploy.formats import FORMATS
from compression_manager.deploy.reference import Reference
from compression_manager.errors import ConfigError, suggest
from compression_manager.models.calling import call_model, quiet_evaluation, tensors_in
from compression_manager.quantization.tensors.memory_format import with_channels_last
from compression_manager.tracing.graph_inputs import (
    Arguments,
    constants_in,
    positional_of,
    without_constants,
)
from compression_manager.tracing.program import (
    arguments_of,
    batch_size,
    brief,
    trace,
    with_batch,
)

Runner = Callable[..., Any]


class Source:
    """What routes are built from.

    Attributes:
        model: the converted model, in eval mode.
        reference: what it returns for the inputs that are measured.
        examples: the inputs, of at least two samples, to trace the model with.
        onnx_seconds: how long it took to make `onnx`; 0 if it was not made yet.
    """

    def __init__(self, model: nn.Module, reference: Reference) -> None:
        self.model = model
        self.reference = reference
        self.onnx_seconds = 0.0
        inputs = reference.inputs
        self.examples = with_batch(inputs, max(2, batch_size(inputs)))

    @functools.cached_property
    def onnx(self) -> bytes:
        """The model as an ONNX file."""
        from compression_manager.integrations.onnx_export import to_onnx

        begin = time.perf_counter()
        content = to_onnx(trace(self.model, self.examples))
        self.onnx_seconds = time.perf_counter() - begin
        return content

    def structured(self, run: Runner) -> Runner:
        """Let `run`, which takes tensors and knows no classes, be called as the model is.

        Raises:
            ConfigError: what the model returns beside tensors depends on the batch.
        """
        leaves, structure = tree_flatten(self.reference.output)
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        if not all(is_tensor):
            self._require_constant([leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)])
        arguments = Arguments(*positional_of(self.model), {})
        constants = constants_in(arguments.leaves(*arguments_of(self.reference.inputs)))
        on_tensors = without_constants(run)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = constants_in(arguments.leaves(args, kwargs))
            if not _same(given, constants):
                raise ConfigError(
                    "this route computes with the arguments that it was measured with, beside "
                    f"tensors: {_words(constants)}; got {_words(given)}."
                )
            tensors = tensors_in(on_tensors(*args, **kwargs))
            filled = [
                next(tensors) if replaced else leaf
                for leaf, replaced in zip(leaves, is_tensor, strict=True)
            ]
            return tree_unflatten(filled, structure)

        return call

    def _require_constant(self, leaves: list[Any]) -> None:
        inputs = self.reference.inputs
        other = with_batch(inputs, 1 if batch_size(inputs) > 1 else 2)
        try:
            with quiet_evaluation(self.model, restore_buffers=True):
                found = tree_leaves(call_model(self.model, other))
        except Exception as error:
            raise ConfigError(
                f"what the model returns beside tensors ({leaves}) may depend on the number of "
                f"samples, of which it does not take {batch_size(other)} made of the inputs: "
                f"{brief(error)}"
            ) from error
        others = [leaf for leaf in found if not isinstance(leaf, torch.Tensor)]
        if repr(others) != repr(leaves):
            raise ConfigError(
                "what the model returns beside tensors depends on the number of samples "
                f"({leaves} and {others}), which this route cannot compute."
            )


def _same(given: Mapping[Any, Any], expected: Mapping[Any, Any]) -> bool:
    return given.keys() == expected.keys() and all(
        repr(given[path]) == repr(value) for path, value in expected.items()
    )


def _words(constants: Mapping[tuple[str, ...], Any]) -> str:
    return ", ".join(f"{' '.join(path)}={value!r}" for path, value in constants.items()) or "none"


class Route(ABC):
    """One way to run a model.

    Attributes:
        name: what users call it.
        packages: optional packages that it needs.
        extra: extra of this distribution that installs `packages`.
        from_onnx: whether it is built from `Source.onnx`.
        cpu_only: whether it always computes on the CPU.
        int8_settings: which settings of `int8` there are to build it with, the preferred one first.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    from_onnx: ClassVar[bool] = False
    cpu_only: ClassVar[bool] = False
    int8_settings: ClassVar[tuple[bool, ...]] = (True,)

    def suits(self, inputs: Any) -> bool:
        """Return whether it is measured for inputs such as these if nobody names it."""
        return True

    @abstractmethod
    def build(self, source: Source, *, int8: bool) -> tuple[Runner, str]:
        """Return what is called as the model is, and which kernels it runs on."""


class _Eager(Route):
    name = "eager"

    def build(self, source: Source, *, int8: bool) -> tuple[Runner, str]:
        return _without_gradients(source.model), "the model's own"


class _ChannelsLast(Route):
    """Hands over images in the order in which oneDNN's 8-bit convolutions read and write them."""

    name = "channels_last"

    def suits(self, inputs: Any) -> bool:
        return any(_is_reordered(tensor) for tensor in tensors_in(inputs))

    def build(self, source: Source, *, int8: bool) -> tuple[Runner, str]:
        if not self.suits(source.reference.inputs):
            raise ConfigError(
                "it makes no difference to these inputs: none is a batch of images, or all are "
                "channels_last as they are."
            )
        run = _without_gradients(source.model)

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(torch.Tensor, with_channels_last, (args, kwargs))
            return run(*args, **kwargs)

        return call, "the model's own"


class _Inductor(Route):
    name = "inductor"

    def build(self, source: Source, *, int8: bool) -> tuple[Runner, str]:
        compiled = traced_for_compiler(source.model, source.reference.inputs)
        compile_now(compiled, source.reference.inputs)
        if not compiled.layers:
            return compiled, "float32"
        return compiled, f"8-bit in {compiled.int8_kernels} of {compiled.layers} layers"


class _AotInductor(Route):
    name = "aot_inductor"

    def build(self, source: Source, *, int8: bool) -> tuple[Runner, str]:
        format = FORMATS["aot_inductor"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            format.write(trace(source.model, source.examples, view=format.view), path)
            run = format.load(path, int8=int8)
        return run, "float32" if format.view == "formulas" else "8-bit"


class _GraphRoute(Route):
    """A runtime that reads `Source.onnx`."""

    from_onnx = True
    cpu_only = True
    int8_settings = (True, False)

    def build(self, source: Source, *, int8: bool) -> tuple[Runner, str]:
        run = self.load(source.onnx, int8=int8)
        return source.structured(run), "8-bit" if int8 else "float32"

    @abstractmethod
    def load(self, content: bytes, *, int8: bool) -> Runner:
        """Return what runs the content of an ONNX file."""


class _OnnxRuntime(_GraphRoute):
    name = "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnxruntime"

    def load(self, content: bytes, *, int8: bool) -> Runner:
        from compression_manager.integrations.onnx_runtime import load_onnx

        return load_onnx(content, int8=int8)


class _OpenVino(_GraphRoute):
    name = "openvino"
    packages = ("onnx", "onnxscript", "openvino")
    extra = "openvino"
    bfloat16: ClassVar[bool] = False

    def load(self, content: bytes, *, int8: bool) -> Runner:
        from compression_manager.integrations.openvino_runtime import load_openvino

        return load_openvino(content, int8=int8, bfloat16=self.bfloat16)


class _OpenVinoInBfloat16(_OpenVino):
    """Rounds what is not quantized to bfloat16, so that it is measured only if it is named."""

    name = "openvino_bfloat16"
    bfloat16 = True

    def suits(self, inputs: Any) -> bool:
        return False


def _without_gradients(model: nn.Module) -> Runner:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def _is_reordered(tensor: torch.Tensor) -> bool:
    return with_channels_last(tensor) is not tensor


_ALL = (
    _Eager(),
    _ChannelsLast(),
    _Inductor(),
    _AotInductor(),
    _OnnxRuntime(),
    _OpenVino(),
    _OpenVinoInBfloat16(),
)
ROUTES: dict[str, Route] = {item.name: item for item in _ALL}


def find_routes(names: object, inputs: Any) -> list[Route]:
    """Return `eager` and the routes called `names`, in the order of `ROUTES`.

    Args:
        names: what the user chose; None for all that suit the inputs.
        inputs: what the model is called with.

    Raises:
        ConfigError: an unknown name; with the nearest ones.
    """
    if names is None:
        return [route for route in ROUTES.values() if route.suits(inputs)]
    if isinstance(names, str) or not isinstance(names, (list, tuple, set, frozenset)):
        raise ConfigError(f"routes is a list of names ({', '.join(ROUTES)}), got {names!r}.")
    for name in names:
        if name not in ROUTES:
            raise ConfigError(f"there is no route {name!r}; {suggest(str(name), ROUTES)}")
    return [route for name, route in ROUTES.items() if name == "eager" or name in names]
