"""The states of all random number generators that training may use."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from compression_manager.errors import CheckpointMismatchError


def capture_random_state() -> dict[str, Any]:
    """Return the states of Python's `random`, NumPy (if imported), torch and all CUDA devices.

    Generator objects of the user's own are not included.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state(legacy=False)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to what `capture_random_state` returned; all of them, or none.

    Generators that exist in only one of the two processes (another number of CUDA devices,
    no NumPy) are left alone.

    Raises:
        CheckpointMismatchError: a state does not fit its generator.
    """
    before = capture_random_state()
    try:
        _set(state)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        _set(before)
        raise CheckpointMismatchError(
            f"the random state does not fit this version of Python, NumPy or torch: {error}"
        ) from error


def seed_everything(seed: int) -> None:
    """Seed Python's `random`, NumPy (if imported) and torch.

    Args:
        seed: from 0 to 2**32 - 1, NumPy's limit.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _set(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    # Imported if need be: the training may come to use it after this.
    if "numpy" in state and importlib.util.find_spec("numpy") is not None:
        import numpy as np

        np.random.set_state(state["numpy"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state.get("cuda", ())):
            if device < torch.cuda.device_count():
                torch.cuda.set_rng_state(cuda_state, device)
