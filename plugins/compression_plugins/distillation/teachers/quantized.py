"""A teacher whose logits have the precision of a few bits."""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch
from torch import Tensor, nn

from compression_manager.configuration.checks import require_integer, require_type
from compression_manager.errors import CheckpointMismatchError, ConfigError, NotExportableError
from compression_manager.models.calling import call_model, quiet_evaluation, without_labels
from compression_manager.quantization import (
    QuantizationScheme,
    choose_qparams,
    fake_quantize,
)
from compression_manager.quantization.arithmetic.parameters import zero_point_dtype
from compression_manager.quantization.exporting import is_exporting
from compression_manager.quantization.quantizers.precision import Float32Buffers
from compression_plugins.distillation.outputs import find_logits
from compression_plugins.distillation.teachers.distortion import (
    TeacherDistortion,
    measure_distortion,
)
from compression_plugins.distillation.teachers.exporting import export_program
from compression_plugins.distillation.teachers.int8_weights import with_int8_weights
from compression_plugins.distillation.teachers.logit_grid import (
    OWNER,
    can_read,
    check_grid,
    clipped_fraction,
    describe_clipping,
    finite_range,
)

# A batch that loses more than this to clipping is worth a warning.
MAX_CLIPPED_FRACTION = 0.01


class QuantizedTeacher(Float32Buffers):
    """A trained teacher that answers with fake-quantized logits.

    `forward` takes what the teacher takes and returns its logits, (*, classes) in the teacher's
    dtype, as `(clamp(round(x * (1 / scale)) + zero_point) - zero_point) * scale`. The gradient
    passes through to the inputs unchanged, also where a logit was clipped. This is AiDotNet's
    QuantizedTeacherModel, with integer zero points and exact arithmetic up to 32 bits.

    The teacher is frozen, and runs in eval mode whatever `train()` is called on. Its parameters'
    `requires_grad` and its modes are all that changes in it.

    With a fixed range, a batch of which more than 1% of the logits are clipped causes one warning
    per object. To find out, one number per batch is read back from the device, until then;
    compiled and exported forward passes do not look.

    Args:
        model: the trained teacher; with `weights=True` a copy of it is kept instead.
        bits: of each logit, 1 to 32; the integers are signed.
        output_dimension: number of classes, compared with every output; None takes it from the
            first output.
        scale: step between two levels, positive; default 1 / 2^(bits - 1).
        zero_point: integer of logit 0, only with `symmetric=False`; default 0.
        symmetric: narrow range around zero, instead of all 2^bits integers.
        dynamic: take the range of the finite logits of every batch, instead of a fixed one.
        weights: store the copy's weights as int8 with a scale per channel.
        output: key or index of the logits in what the model returns; default: found.
        example_inputs: what the loop calls the teacher with; finds the output dimension now.

    Attributes:
        scheme: bits, symmetry, and whether the range is dynamic.
        scale: () float32 buffer, or None with `dynamic`.
        zero_point: () int32 buffer (int64 above 24 bits), or None with `dynamic`.

    Raises:
        QuantizationError: `bits`, `symmetric` or `dynamic` is invalid.
        ConfigError: another argument is invalid, or the example's logits have another dimension
            than `output_dimension`. The model is untouched then.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    quant_range: Tensor

    def __init__(
        self,
        model: nn.Module,
        bits: int = 8,
        output_dimension: int | None = None,
        scale: float | None = None,
        zero_point: int | None = None,
        symmetric: bool = True,
        dynamic: bool = False,
        weights: bool = False,
        *,
        output: str | int | None = None,
        example_inputs: Any = None,
    ) -> None:
        super().__init__()
        require_type(OWNER, "model", model, nn.Module)
        require_type(OWNER, "weights", weights, bool)
        if output_dimension is not None:
            require_integer(OWNER, "output_dimension", output_dimension, minimum=1)
        self.scheme = QuantizationScheme(bits=bits, symmetric=symmetric, dynamic=dynamic)
        self._output = output
        self._output_dimension = output_dimension
        self._has_own_weights = weights
        self._warned = False
        self._add_parameters(_device_of(model), scale, zero_point)
        self.model = with_int8_weights(model) if weights else model
        if example_inputs is not None:
            with quiet_evaluation(self.model):
                self._check_dimension(self._float_logits(self.model, example_inputs))
        self.model.requires_grad_(False)
        self.eval()

    @property
    def output_dimension(self) -> int | None:
        """Number of classes, or None before the first output if it was not given."""
        return self._output_dimension

    @property
    def supports_export(self) -> bool:
        """Whether the range is fixed, so that `export_graph` and torch.export work."""
        return not self.scheme.dynamic

    def get_logits(self, input: Any) -> Tensor:
        """Return the quantized logits, (*, classes), for what a loop calls the student with.

        Args:
            input: a tensor; a tuple, passed by position; or a mapping, passed by keyword without
                the entries `label` and `labels`.

        Raises:
            ConfigError: the output holds no logits, or `output_dimension` is another one.
        """
        logits: Tensor = call_model(self, without_labels(input))
        return logits

    def forward(self, input: Any = None, /, *args: Any, **kwargs: Any) -> Tensor:
        """Return the quantized logits; takes what the teacher takes, by position or by keyword."""
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        # A name for the first input lets torch.export take `dynamic_shapes` in the usual form.
        positional = () if input is None and not args else (input, *args)
        logits = self._pick(self.model(*positional, **kwargs))
        self._check_dimension(logits)
        return self._quantize(logits)

    def export_graph(
        self, example_inputs: Any, *, dynamic_batch: bool = True
    ) -> torch.export.ExportedProgram:
        """Return the teacher and its quantizer as a graph of torch.export.

        Args:
            example_inputs: what the loop calls the teacher with, as for `get_logits`.
            dynamic_batch: let dimension 0 vary in every tensor whose dimension 0 is as long as
                the first tensor's.

        Raises:
            NotExportableError: the range is dynamic, or torch.export cannot trace the teacher.
            ConfigError: the batch shall vary and the example has a single row.
        """
        if self.scheme.dynamic:
            _raise_not_exportable()
        inputs = without_labels(example_inputs)
        return export_program(self, inputs, dynamic_batch=dynamic_batch)

    def distortion(self, inputs: Any, float_teacher: nn.Module | None = None) -> TeacherDistortion:
        """Compare the quantized teacher with the float one on a batch.

        Args:
            inputs: as for `get_logits`.
            float_teacher: the model to compare with; needed with `weights=True`, because the
                original is not kept. Default: the wrapped model's own logits.

        Raises:
            ConfigError: the float teacher is missing, its logits have another shape, or the batch
                is empty.
        """
        if float_teacher is None and self._has_own_weights:
            raise ConfigError(
                f"{OWNER}(weights=True) does not keep the float weights; pass the original model: "
                "distortion(inputs, float_teacher)."
            )
        reference = self.model if float_teacher is None else float_teacher
        with quiet_evaluation(reference, self):
            exact = self._float_logits(reference, inputs)
            return measure_distortion(exact, self.get_logits(inputs))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the teacher stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def extra_repr(self) -> str:
        """Return the scheme, for `print`."""
        return str(self.scheme)

    def _add_parameters(
        self, device: torch.device, scale: float | None, zero_point: int | None
    ) -> None:
        scheme = self.scheme
        # Part of the state, so that one of another width is noticed.
        limits = torch.tensor([scheme.quant_min, scheme.quant_max], device=device)
        self.register_buffer("quant_range", limits)
        for name, value in (("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, None)
            if scheme.dynamic and value is not None:
                raise ConfigError(
                    f"{OWNER}.{name}={value} has no use with dynamic=True, which takes the range "
                    "of every batch; drop one."
                )
        if scheme.dynamic:
            return
        scale = 2.0 ** (1 - scheme.bits) if scale is None else scale
        zero_point = 0 if zero_point is None else zero_point
        check_grid(scale, zero_point, scheme)
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.zero_point = torch.tensor(zero_point, dtype=zero_point_dtype(scheme), device=device)

    def _quantize(self, logits: Tensor) -> Tensor:
        scheme = self.scheme
        if self.scale is None or self.zero_point is None:
            if is_exporting():
                _raise_not_exportable()
            scale, zero_point = choose_qparams(*finite_range(logits, scheme), scheme)
        else:
            scale, zero_point = self.scale, self.zero_point
            if scale.device != logits.device:
                # The model is spread over several devices.
                scale, zero_point = scale.to(logits.device), zero_point.to(logits.device)
            self._warn_if_clipped(logits, scale, zero_point)
        return fake_quantize(
            logits,
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            pass_clipped_gradient=True,
        )

    def _warn_if_clipped(self, logits: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        if not can_read(logits) or self._warned:
            return
        fraction = clipped_fraction(logits, scale, zero_point, self.scheme)
        if fraction > MAX_CLIPPED_FRACTION:
            self._warned = True
            warnings.warn(describe_clipping(fraction, logits, self.scheme), stacklevel=2)

    def _check_dimension(self, logits: Tensor) -> None:
        if self._output_dimension is None:
            if not torch.compiler.is_compiling():
                self._output_dimension = logits.shape[-1]
        elif logits.shape[-1] != self._output_dimension:
            raise ConfigError(
                f"{OWNER}.output_dimension is {self._output_dimension}, but the teacher's logits "
                f"have {logits.shape[-1]} classes."
            )

    def _float_logits(self, model: nn.Module, inputs: Any) -> Tensor:
        return self._pick(call_model(model, without_labels(inputs)))

    def _pick(self, output: Any) -> Tensor:
        return find_logits(output, self._output, where="teacher", owner=OWNER, option="output")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Called before anything is loaded into the wrapped model.
        scheme, found = self.scheme, state_dict.get(f"{prefix}quant_range")
        if found is not None and found.tolist() != [scheme.quant_min, scheme.quant_max]:
            raise CheckpointMismatchError(
                f"the state is that of a {OWNER} with integers from {int(found[0])} to "
                f"{int(found[1])}; this one, {scheme}, has {scheme.quant_min} to "
                f"{scheme.quant_max}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# Constant to the compiler, so that strict tracing lets the exception through as it is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # untyped in torch
def _raise_not_exportable() -> None:
    raise NotExportableError(
        f"{OWNER}(dynamic=True) takes its range from every batch and has no fixed parameters to "
        "export; make one with a fixed range (dynamic=False, scale=...). Its warning names the "
        "scale that holds a batch."
    )


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
