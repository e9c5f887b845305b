"""Saving and resuming: the continued training is the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_manager.errors import CompressionError
from compression_manager.manager import CompressionManager
from compression_manager.metrics import Metric
from compression_manager.models.calling import tensors_in
from compression_manager.state import seed_everything, write_checkpoint
from compression_manager.testing.comparison import differences
from compression_manager.testing.contract.base import SEED, ContractRuns, Run, require_none
from compression_manager.testing.failing import InjectedError

_STEP = 1
"""The step of the first epoch after which the training is saved in mid-epoch."""

_ADVICE = (
    "keep what later steps depend on in state_dict() and put it back in load_state_dict(), or in "
    "buffers of the model:"
)


class ResumingContract(ContractRuns):
    """Tests of trainings that are interrupted; saved to disk and continued in new objects."""

    def test_resumes_in_mid_epoch(self) -> None:
        """Saved within an epoch, continued by `manager.steps`."""
        whole = self._start("whole", recorded=True).train()
        broken = self._start("parts")

        def save(epoch: int, step: int, loss: Tensor) -> None:
            if (epoch, step) == (0, _STEP):
                self._save(broken.manager)
                raise InjectedError

        with pytest.raises(InjectedError):
            broken.train(after_step=save)
        self._compare(self._resume().train(), whole, steps=_STEP + 1, where="in mid-epoch")

    def test_resumes_at_an_epochs_end(self) -> None:
        """Saved after `on_epoch_end`, continued by a plain loop."""
        whole = self._start("whole", recorded=True).train_with_hooks()
        broken = self._start("parts")

        def save(epoch: int) -> None:
            self._save(broken.manager)
            raise InjectedError

        with pytest.raises(InjectedError):
            broken.train_with_hooks(after_epoch=save)
        broken.manager.close()
        steps = len(whole.losses) // 2
        self._compare(self._resume().train_with_hooks(), whole, steps, where="at an epoch's end")

    def test_state_holds_no_tensor_of_the_model(self) -> None:
        """Tensors of layers are buffers or parameters, which the model saves and moves itself."""
        run = self._start().train()
        own = {tensor.data_ptr() for tensor in run.model.state_dict().values() if tensor.numel()}
        shared = [
            f"plugin '{name}'"
            for name, state in run.manager.state_dict()["plugins"].items()
            if any(tensor.numel() and tensor.data_ptr() in own for tensor in tensors_in(state))
        ]
        require_none(
            shared,
            "state_dict() returns tensors that the model holds already, so that checkpoints have "
            "them twice and loading sets them twice; leave them out:",
        )

    def _save(self, manager: CompressionManager) -> None:
        try:
            write_checkpoint(self._root / "checkpoint", manager.state_dict(), metadata={})
        except CompressionError as error:
            raise AssertionError(
                f"the state cannot be written to disk: {error}\nstate_dict() returns numbers, "
                "texts, None, tensors, and lists, tuples and dicts of these."
            ) from error

    def _resume(self) -> Run:
        """Continue in new objects with other weights and another random state."""
        run = self._start("parts", recorded=True)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1)
        seed_everything(SEED + 1)
        run.manager.resume(self._root / "checkpoint")
        return run

    def _compare(self, resumed: Run, whole: Run, steps: int, where: str) -> None:
        checks: list[tuple[str, Callable[[Run], Any], Any]] = [
            ("the losses", lambda run: run.losses, whole.losses[steps:]),
            ("the state", Run.state, whole.state()),
        ]
        for what, of, expected in checks:
            require_none(
                differences(of(resumed), expected, what),
                f"a training that is resumed {where} ends otherwise than without the "
                f"interruption; {_ADVICE}",
            )
        metrics = _metrics(resumed)
        require_none(
            differences(metrics, _metrics(whole)[-len(metrics) :], "metric"),
            f"a training that is resumed {where} publishes other metrics than without the "
            f"interruption; {_ADVICE}",
        )


def _metrics(run: Run) -> list[Any]:
    """Return name, step and value of what was published; of pictures, name and step."""
    assert run.recording is not None
    return [
        (metric.name, metric.global_step, metric.value if metric.kind == "scalar" else metric.kind)
        for arguments in run.recording.arguments("consume_metrics")
        for metric in _as_metrics(arguments["metrics"])
    ]


def _as_metrics(value: Any) -> list[Metric]:
    return list(value)
