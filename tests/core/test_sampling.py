"""A few values of a tensor, from the same places every time."""

import torch

from compression_manager.sampling import sample


def test_the_same_places_whatever_the_default_device_is_at_first() -> None:
    values = torch.arange(1009)
    with torch.device("meta"), torch.inference_mode():
        first = sample(torch.arange(1009, device="cpu"), 8)
    assert first == sample(values, 8)
    assert len(set(first)) > 4
    assert sample(values[:0], 8) == []


def test_many_sizes_take_no_memory() -> None:
    from compression_manager import sampling

    for length in range(1, 600):
        sample(torch.zeros(length), 4)
    assert sampling._places.cache_info().currsize <= 256
