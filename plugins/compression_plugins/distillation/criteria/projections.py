"""Bringing a student's features to the shape of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.errors import CheckpointMismatchError, ConfigError
from compression_manager.state import capture_random_state, restore_random_state

_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Projection(nn.Module):
    """Changes the size of images by interpolation, then the width by a learned map.

    Shrinking averages areas, growing is bilinear (trilinear). The map is what FitNets (Romero et
    al. 2015, section 2.2) calls a regressor: a 1x1 convolution over the channels, or a linear map
    of the last dimension. Drawing its weights leaves the random state as it was.

    Args:
        dimensions: of a convolution's input, 3 to 5; None for a linear map.
        width: number of channels or features before and after; None without a map.
        size: sizes of the dimensions from 2 on; None leaves them.
        device: where the weights are created.
    """

    def __init__(
        self,
        dimensions: int | None,
        width: tuple[int, int] | None,
        size: tuple[int, ...] | None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._made_with = (dimensions, width, size)
        self.size = size
        self.map: nn.Module | None = None
        if width is None:
            return
        random_state = capture_random_state()
        if dimensions is None:
            self.map = nn.Linear(*width, device=device)
        else:
            self.map = _CONVOLUTIONS[dimensions](*width, 1, device=device)
        restore_random_state(random_state)

    def forward(self, feature: Tensor) -> Tensor:
        """Return `feature` in the teacher's shape, float32 at least."""
        feature = feature if feature.element_size() >= 4 else feature.float()
        if self.size is not None and tuple(feature.shape[2:]) != self.size:
            feature = _resize(feature, self.size)
        if self.map is None:
            return feature
        mapped: Tensor = self.map(feature)
        return mapped

    def describe(self) -> dict[str, Any]:
        """Return everything that `restore` needs: how it was made, its tensors and gradients."""
        named = dict(self.named_parameters())
        return {
            "made_with": self._made_with,
            "parameters": {name: value.detach() for name, value in named.items()},
            # Of an unfinished accumulation.
            "gradients": {
                name: value.grad for name, value in named.items() if value.grad is not None
            },
        }

    def restore(self, described: Mapping[str, Any], name: str) -> Projection:
        """Return a projection in the described state: this one, or a new one of other shape.

        Raises:
            CheckpointMismatchError: this is no description of a projection.
        """
        device = next((parameter.device for parameter in self.parameters()), None)
        try:
            if described["made_with"] == self._made_with:
                projection = self
            else:
                dimensions, width, size = described["made_with"]
                projection = Projection(dimensions, width, size, device)
            for saved in described["parameters"].values():
                projection.to(saved.dtype)  # float64 of a student that is
            projection.load_state_dict(dict(described["parameters"]))
            for key, parameter in projection.named_parameters():
                gradient = described["gradients"].get(key)
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointMismatchError(
                f"the checkpoint's projection of '{name}' does not fit: {error}"
            ) from error
        return projection

    def extra_repr(self) -> str:
        """Return the target size, for `print`."""
        return "" if self.size is None else f"size={self.size}"


def identity_projection() -> Projection:
    """Return a projection that changes nothing, from which `restore` makes others."""
    return Projection(None, None, None)


def make_projection(
    student: Sequence[int], teacher: Sequence[int], *, width_too: bool, device: torch.device
) -> Projection | None:
    """Return what maps features of shape `student` to shape `teacher`, or None if nothing must be.

    Four and five dimensions are (batch, channels, *spatial); fewer are (batch, features) or
    (batch, tokens, features), unless only dimension 1 differs, which then is that of channels.

    Args:
        student: shape of the student's features.
        teacher: shape of the teacher's.
        width_too: whether the number of channels must agree, and not only the other sizes.
        device: where the weights are created.

    Raises:
        ConfigError: no projection leads from one shape to the other.
    """
    student, teacher = tuple(student), tuple(teacher)
    if student == teacher:
        return None
    if len(student) != len(teacher) or student[0] != teacher[0] or not 2 <= len(student) <= 5:
        raise _no_way(student, teacher)
    is_image = len(student) >= 4
    channels_first = is_image or (len(student) == 3 and student[2] == teacher[2])
    if not channels_first and student[1:-1] != teacher[1:-1]:
        raise _no_way(student, teacher)
    size = teacher[2:] if is_image and student[2:] != teacher[2:] else None
    axis = 1 if channels_first else -1
    needs_map = width_too and student[axis] != teacher[axis]
    width = (student[axis], teacher[axis]) if needs_map else None
    if width is None and size is None:
        return None
    return Projection(len(student) if channels_first else None, width, size, device)


def _resize(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    if all(now >= then for now, then in zip(feature.shape[2:], size, strict=True)):
        return F.interpolate(feature, size, mode="area")
    return F.interpolate(feature, size, mode="bilinear" if len(size) == 2 else "trilinear")


def _no_way(student: Sequence[int], teacher: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"features of shape {tuple(student)} (student) and {tuple(teacher)} (teacher) cannot be "
        "compared and no projection leads from one to the other: it changes the size of images "
        "and the number of channels or features, nothing else. Map other layers, or pick a part of "
        "the output with an index, a key or a function."
    )
