"""Which dimension of an output holds the classes."""

from __future__ import annotations

from torch import Tensor

from compression_manager.errors import ConfigError, blame_option

OPTION = "criterion.class_dimension"


def classes_last(logits: Tensor, class_dimension: int | None) -> Tensor:
    """Return a view of `logits` with the classes in the last dimension.

    Args:
        logits: (batch, *) with the classes in any other dimension.
        class_dimension: where they are; None: in the last one.

    Raises:
        ConfigError: there is no such dimension, or it is the batch.
    """
    if class_dimension is None:
        return logits
    position = dimension_of_classes(logits, class_dimension)
    return logits.movedim(position, -1)


def dimension_of_classes(logits: Tensor, class_dimension: int | None) -> int:
    """Return the dimension that `class_dimension` means, counted from 0; errors as above."""
    count = logits.dim()
    position = -1 if class_dimension is None else class_dimension
    if not -count <= position < count or (class_dimension is not None and position % count == 0):
        with blame_option(OPTION):
            raise ConfigError(
                f"class_dimension is {class_dimension}, which an output of shape "
                f"{tuple(logits.shape)} does not have besides its batch (dimension 0)."
            )
    return position % count


def has_known_classes(logits: Tensor, class_dimension: int | None) -> bool:
    """Return whether it is clear which dimension holds the classes, and there is one."""
    return logits.dim() >= 2 and (class_dimension is not None or logits.dim() < 4)


def require_classes(logits: Tensor, class_dimension: int | None, loss: str) -> None:
    """Refuse what `loss` would take no, or another, distribution over classes of.

    Args:
        logits: of the student, as `classes_last` returned them.
        class_dimension: the criterion's option.
        loss: name of a loss with a softmax.

    Raises:
        ConfigError: images and the like without `class_dimension`; or fewer than two classes, of
            which each softmax is 1.
    """
    shape = tuple(logits.shape)
    if logits.dim() >= 2 and not has_known_classes(logits, class_dimension):
        with blame_option(OPTION):
            raise ConfigError(
                f"'{loss}' compares distributions over classes, and which dimension of an output "
                f"of shape {shape} holds these has to be said: class_dimension=1 for images "
                "(N, classes, height, width), class_dimension=-1 for classes in the last dimension."
            )
    if logits.dim() < 2 or logits.shape[-1] < 2:
        what = "no dimension of classes" if logits.dim() < 2 else "a single class"
        raise ConfigError(
            f"'{loss}' compares distributions over classes, but the output of shape {shape} has "
            f"{what}, so that nothing would be learned; for numbers and single logits choose the "
            "loss 'MSE'."
        )
