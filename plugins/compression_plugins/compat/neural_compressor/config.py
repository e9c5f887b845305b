"""Neural Compressor 2.6's config classes: its fields, order and defaults, and nothing shared.

The objects may be changed until they are given to `prepare_compression`, which checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from compression_plugins.compat.neural_compressor.fields import becomes, without_meaning

_TUNING = "it steers the search of `fit`, which does not exist here"
_TENSORFLOW = "it is TensorFlow's; models here are PyTorch's"


class _Criterion:
    """Base of the criteria."""

    @property
    def config(self) -> SimpleNamespace:
        """`config.<name of the loss>.<field>` reads and sets the same fields, as in 2.6."""
        return SimpleNamespace(**{type(self).__name__.removesuffix("Config"): self})


@dataclass
class KnowledgeDistillationLossConfig(_Criterion):
    """Soft targets: `w0 * task_loss + w1 * T^2 * D(student / T, teacher / T)`."""

    temperature: float = field(default=1.0, metadata=becomes("the same field"))
    loss_types: Any = field(
        default_factory=lambda: ["CE", "CE"],
        metadata=becomes(
            "the same field. 'KL' is a mean over the batch; in 2.6 it was one over all elements, "
            "smaller by the number of classes. For images (N, classes, height, width), whose "
            "softmax 2.6 took over the width, pass `compression_plugins."
            "KnowledgeDistillationLossConfig(class_dimension=1, ...)` as the criterion"
        ),
    )
    loss_weights: Any = field(
        default_factory=lambda: [0.5, 0.5],
        metadata=becomes("the same field; the sum need not be 1"),
    )


@dataclass
class IntermediateLayersKnowledgeDistillationLossConfig(_Criterion):
    """Features: `sum of w_i * D_i(student layer, teacher layer)`, and the task's loss if asked."""

    layer_mappings: Any = field(
        default_factory=list,
        metadata=becomes(
            "the same field: one name, or a pair, each with the index, key or function of the "
            "output ('' for none). A text of digits is an index, never a key. Layers of different "
            "width get a projection that the optimizer trains; 2.6 never trained it"
        ),
    )
    loss_types: Any = field(
        default_factory=list,
        metadata=becomes(
            "the same field; [] is 'MSE' for each. 'KL' is a mean over the batch; as in 2.6, rows "
            "that are distributions already get no softmax"
        ),
    )
    loss_weights: Any = field(
        default_factory=list,
        metadata=becomes("the same field; [] is 1 / number of mappings for each"),
    )
    add_origin_loss: bool = field(
        default=False,
        metadata=becomes(
            "the same field. Beside a KnowledgeDistillationLossConfig, that one's weight of the "
            "task's loss counts, once; 2.6 returned a list of losses"
        ),
    )


@dataclass
class SelfKnowledgeDistillationLossConfig(_Criterion):
    """Named outputs of one model: `sum of w_g * D_g(shallow, deep)` over groups of pairs."""

    layer_mappings: Any = field(
        default_factory=list,
        metadata=becomes(
            "the same field: groups of pairs of names in the dictionary that the loop passes as "
            "student_output or teacher_output. Each pair counts once; in 2.6 each group counted "
            "again with every later one"
        ),
    )
    temperature: float = field(
        default=1.0,
        metadata=becomes(
            "as in 2.6: both outputs of the second group are divided by it, those of the others "
            "are not, and nothing is multiplied by its square"
        ),
    )
    loss_types: Any = field(
        default_factory=list,
        metadata=becomes(
            "the same field: 'CE', 'KL' (mean over the batch), 'L2' (Euclidean distance of the "
            "whole batch). [] is 'CE' for each; 2.6 failed"
        ),
    )
    loss_weights: Any = field(
        default_factory=list,
        metadata=becomes("the same field; [] is 1 / number of groups for each, where 2.6 failed"),
    )
    add_origin_loss: bool = field(
        default=False, metadata=becomes("the same field, as of intermediate layers")
    )


@dataclass
class DistillationConfig:
    """A teacher and a criterion."""

    teacher_model: Any = field(
        default=None,
        metadata=becomes(
            "the same field. None takes the outputs that the loop passes as teacher_output (2.6 "
            "failed); those also replace a call of the teacher, as in 2.6. The teacher must not be "
            "the student. Self-distillation does not use it"
        ),
    )
    criterion: Any = field(
        default_factory=KnowledgeDistillationLossConfig,
        metadata=becomes(
            "the same field; a new KnowledgeDistillationLossConfig() by default, where 2.6 shared "
            "one between all configs"
        ),
    )
    optimizer: Any = field(
        default_factory=lambda: {"SGD": {"learning_rate": 0.0001}},
        metadata=without_meaning("the optimizer is the one of your loop, as it was in 2.6"),
    )


@dataclass
class QuantizationAwareTrainingConfig:
    """Quantization-aware training, int8 from the first step on."""

    device: str = field(default="cpu", metadata=without_meaning("the model stays on its device"))
    backend: str = field(
        default="default", metadata=without_meaning("there is one backend, PyTorch")
    )
    inputs: Any = field(default_factory=list, metadata=without_meaning(_TENSORFLOW))
    outputs: Any = field(default_factory=list, metadata=without_meaning(_TENSORFLOW))
    op_type_dict: Any = field(
        default=None,
        metadata=becomes(
            "`QATConfig.overrides` by class, such as 'Linear', 'Conv2d' or 'Conv' for all of them: "
            "the weight's dtype 'fp32' leaves the layers in float, that of the activation alone "
            "quantizes weights only. An unknown class is an error"
        ),
    )
    op_name_dict: Any = field(
        default=None,
        metadata=becomes(
            "`QATConfig.overrides` by layer, in the same way, also of convolutions (2.6 ignored "
            "those). An unknown name is an error; `*` matches any part of a name"
        ),
    )
    reduce_range: bool | None = field(
        default=None,
        metadata=becomes("True gives activations 7 bits; 2.6 decided by the processor"),
    )
    model_name: str = field(default="", metadata=without_meaning("nothing depends on a name"))
    quant_format: str = field(default="default", metadata=without_meaning("it is ONNX Runtime's"))
    excluded_precisions: Any = field(
        default_factory=list,
        metadata=without_meaning("no layer is turned into bf16 or fp16 at conversion"),
    )
    quant_level: Any = field(default="auto", metadata=without_meaning(_TUNING))
    accuracy_criterion: Any = field(default=None, metadata=without_meaning(_TUNING))
    tuning_criterion: Any = field(default=None, metadata=without_meaning(_TUNING))


@dataclass
class _WeightPruningFields:
    pruning_configs: Any = field(
        default_factory=lambda: [{}],
        metadata=becomes(
            "one instance of the plugin for each dictionary, whose entries replace the fields below"
        ),
    )
    target_sparsity: float = field(default=0.9, metadata=becomes("`sparsity`"))
    pruning_type: str = field(
        default="snip_momentum",
        metadata=becomes("always 'magnitude'; anything else, the default included, warns"),
    )
    pattern: str = field(
        default="4x1",
        metadata=becomes("single weights ('1x1'); anything else, the default included, warns"),
    )
    op_names: Any = field(
        default_factory=list,
        metadata=becomes(
            "`include`: layers in whose name a regular expression is found; none are all"
        ),
    )
    excluded_op_names: Any = field(
        default_factory=list,
        metadata=becomes(
            "layers that are left out of `include`, in the same way. As in 2.6, so is a Linear or "
            "Conv2d that is the model's last layer"
        ),
    )
    backend: Any = field(default=None, metadata=without_meaning("there is one backend, PyTorch"))
    start_step: int = field(default=0, metadata=becomes("`start`, in optimizer steps"))
    end_step: int = field(
        default=0, metadata=becomes("`end`; up to start_step: all at once, at the start")
    )
    pruning_scope: str = field(
        default="global", metadata=becomes("`scope`: 'global', or 'layer' for 'local'")
    )
    pruning_frequency: int = field(default=1, metadata=becomes("`every`"))
    min_sparsity_ratio_per_op: float = field(
        default=0.0, metadata=without_meaning("the plugin has no limits per layer")
    )
    max_sparsity_ratio_per_op: float = field(
        default=0.98, metadata=without_meaning("the plugin has no limits per layer")
    )
    sparsity_decay_type: str = field(
        default="exp",
        metadata=becomes(
            "always 'cube'; anything else, the default included, warns if there is an end_step"
        ),
    )
    pruning_op_types: Any = field(
        default_factory=lambda: ["Conv", "Linear"],
        metadata=becomes("classes whose name contains one of them"),
    )
    low_memory_usage: bool = field(
        default=False, metadata=without_meaning("masks are booleans, a byte a weight")
    )


class WeightPruningConfig(_WeightPruningFields):
    """Pruning, served by the plugin `magnitude_pruning`.

    Attributes:
        further: arguments beside the fields, which 2.6 takes as well; they are ignored.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        names = {item.name for item in fields(self)}
        super().__init__(*args, **{key: arguments[key] for key in arguments if key in names})
        self.further = {key: arguments[key] for key in arguments if key not in names}
