"""Teacher outputs on disk, so that the teacher runs once and not in every epoch."""

from compression_plugins.distillation.cache.cache import TeacherCache
from compression_plugins.distillation.cache.dataset import IndexedDataset
from compression_plugins.distillation.cache.distortion import CacheDistortion

__all__ = ["CacheDistortion", "IndexedDataset", "TeacherCache"]
