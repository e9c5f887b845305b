"""What a cached output depends on besides its sample and augmentation seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compression_plugins.distillation.cache.encoding import Encoding


@dataclass(frozen=True)
class CacheKey:
    """Equal keys mean interchangeable outputs.

    Attributes:
        teacher_sha256: of the teacher's weights.
        preprocessing: the user's tag.
        top_k: of the encoding.
        dtype: of the encoding.
    """

    teacher_sha256: str
    preprocessing: str
    top_k: int | None
    dtype: str

    @classmethod
    def of(cls, teacher_sha256: str, preprocessing: str, encoding: Encoding) -> CacheKey:
        """Return the key of outputs of one teacher."""
        return cls(teacher_sha256, preprocessing, encoding.top_k, encoding.stored_as)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values that manifests hold."""
        return asdict(self)

    def differences(self, found: Mapping[str, Any]) -> str:
        """Return how `found`, a key as JSON, differs from this one; "" if it does not."""
        return "; ".join(
            f"{name} is {found.get(name)!r}, here {wanted!r}"
            for name, wanted in asdict(self).items()
            if found.get(name) != wanted
        )
