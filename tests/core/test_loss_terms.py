"""`on_after_compute_loss` returns one scalar tensor: the sum of named, weighted terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toys
from compression_manager import (
    CompressionManager,
    ConfigError,
    LifecycleError,
    LossError,
    LossTerms,
    prepare_compression,
)
from probes import begin_step, call_loss, loss_of, probe


def _adds(name: str, value: float, weight: float = 1.0, *, task_weight: float | None = None) -> Any:
    def prepare_model(self: Any, context: Any) -> None:
        if task_weight is not None:
            context.set_task_weight(self.name, task_weight)

    def on_after_compute_loss(self: Any, losses: Any, student_output: Any) -> None:
        losses.add(f"{name}/term", value * student_output.abs().mean(), weight)

    return probe(name, prepare_model=prepare_model, on_after_compute_loss=on_after_compute_loss)


def _begun(*plugins: Any) -> CompressionManager:
    torch.manual_seed(0)
    return begin_step(prepare_compression(toys.mlp(), list(plugins)))


def test_hooks_receive_the_public_type() -> None:
    def check(self: Any, losses: Any) -> None:
        assert isinstance(losses, LossTerms)

    call_loss(_begun(probe(on_after_compute_loss=check)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_without_terms_it_is_the_task_loss_bit_for_bit(shape: tuple[int, ...]) -> None:
    manager = _begun(probe())
    expected = loss_of(manager.model)
    returned = call_loss(manager, loss_of(manager.model).reshape(shape))
    assert returned.shape == ()
    assert torch.equal(returned, expected)
    gradients = torch.autograd.grad(returned, list(manager.model.parameters()))
    reference = torch.autograd.grad(expected, list(manager.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, reference, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_terms_are_weighted_and_summed(count: int) -> None:
    values = [(2.0, 0.5), (3.0, 0.25), (5.0, 1.0)][:count]
    plugins = [
        _adds(f"p{i}", value, weight, task_weight=0.75) for i, (value, weight) in enumerate(values)
    ]
    manager = _begun(*plugins)
    output = manager.model(torch.ones(2, 6)).detach().double()
    task, mean = float(output.square().mean()), float(output.abs().mean())
    returned = call_loss(manager)
    expected = 0.75 * task + sum(weight * value * mean for value, weight in values)
    assert returned.shape == ()
    assert returned.requires_grad
    assert float(returned.detach()) == pytest.approx(expected, rel=1e-6)


def test_a_weight_that_is_a_tensor_gets_its_gradient_even_if_it_is_one() -> None:
    weight = torch.tensor(1.0, requires_grad=True)
    terms = LossTerms(torch.tensor(2.0))
    terms.add("learned", torch.tensor(3.0), weight)
    total = terms.total()
    total.backward()
    assert total.item() == 5.0
    assert weight.grad.item() == 3.0


def test_each_term_is_published_unweighted_and_survives_changes_in_place() -> None:
    seen: dict[str, float] = {}

    def consume_metrics(self: Any, metrics: Any) -> None:
        seen.update({metric.name: metric.as_float() for metric in metrics})

    manager = _begun(_adds("a", 2.0, 0.5), probe("sink", consume_metrics=consume_metrics))
    output = manager.model(torch.ones(2, 6)).detach()
    task = loss_of(manager.model)
    loss = call_loss(manager, task)
    with torch.no_grad():
        loss /= 4
        task /= 4
    manager.on_step_end()
    assert seen["loss/task"] == pytest.approx(float(output.square().mean()))
    assert seen["loss/a/term"] == pytest.approx(2 * float(output.abs().mean()))
    total = seen["loss/task"] + 0.5 * seen["loss/a/term"]
    assert seen["loss/total"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (3.0, "must be a scalar tensor, got float"),
        (None, "got NoneType"),
        ({"box": torch.ones(())}, "got dict; pass the sum of its values"),
        ([torch.ones(())], "got list; pass the sum of its items"),
        (torch.ones(2), r"got shape (2,)"),
        (torch.ones(0), r"got shape (0,)"),
        (torch.tensor(3), "torch.int64"),
        (torch.tensor(1j), "torch.complex64"),
        (torch.tensor(float("nan")), "not finite: task = nan"),
        (torch.tensor(float("-inf")), "not finite: task = -inf"),
    ],
)
def test_unfit_task_loss(loss: Any, text: str) -> None:
    manager = _begun(probe())
    before = (dict(vars(manager._lifecycle)), manager._context.remembered_input)
    with pytest.raises(LossError) as error:
        manager.on_after_compute_loss(torch.ones(2, 6), torch.ones(2, 4), loss)
    assert text in str(error.value)
    assert (dict(vars(manager._lifecycle)), manager._context.remembered_input) == before
    assert manager._context.metrics.drain() == []


@pytest.mark.parametrize("value", [torch.ones(2), 1.0, torch.tensor(1)])
def test_unfit_term_is_named_with_its_plugin(value: Any) -> None:
    def on_after_compute_loss(self: Any, losses: Any) -> None:
        losses.add("mine", value)

    manager = _begun(probe("culprit", on_after_compute_loss=on_after_compute_loss))
    with pytest.raises(LossError, match="loss term 'mine'") as error:
        call_loss(manager)
    assert error.value.__notes__ == ["raised by plugin 'culprit' in hook 'on_after_compute_loss'"]


def test_non_finite_sum_names_every_term_and_its_weight() -> None:
    manager = _begun(_adds("a", 1.0), _adds("b", float("inf"), 0.5))
    with pytest.raises(LossError, match=r"task = .*a/term = .*b/term = inf \(weight 0.5\)"):
        call_loss(manager)


def test_a_weight_that_is_trained_is_named_too() -> None:
    manager = _begun(_adds("b", float("inf"), torch.tensor(0.5, requires_grad=True)))
    with pytest.raises(LossError, match=r"b/term = inf \(weight 0.5\)"):
        call_loss(manager)


@pytest.mark.parametrize("name", ["twice", "task"])
def test_a_name_is_used_once(name: str) -> None:
    def on_after_compute_loss(self: Any, losses: Any, student_output: Any) -> None:
        losses.add(name, student_output.mean())
        losses.add(name, student_output.mean())

    manager = _begun(probe(on_after_compute_loss=on_after_compute_loss))
    with pytest.raises(ConfigError, match=f"'{name}' was added twice"):
        call_loss(manager)


def test_task_weights_must_agree() -> None:
    _begun(_adds("a", 1.0, task_weight=0.5), _adds("b", 1.0, task_weight=0.5))
    with pytest.raises(ConfigError, match=r"'a' sets\s0.5, 'b' sets 0.25"):
        _begun(_adds("a", 1.0, task_weight=0.5), _adds("b", 1.0, task_weight=0.25))


def test_everything_the_loop_knows_reaches_the_plugins() -> None:
    given = {name: object() for name in ("target", "mask", "sample_ids", "num_items")}
    expected = {"input": "in", "student_output": "out", "teacher_output": "teacher", **given}
    seen: list[dict[str, Any]] = []

    def on_after_compute_loss(
        self: Any, input: Any, student_output: Any, teacher_output: Any, target: Any, mask: Any,
        sample_ids: Any, num_items: Any,
    ) -> None:  # fmt: skip
        values = locals()
        seen.append({name: values[name] for name in expected})

    manager = _begun(probe(on_after_compute_loss=on_after_compute_loss))
    manager.on_after_compute_loss("in", "out", torch.ones(()), "teacher", **given)  # type: ignore[arg-type]
    assert seen == [expected]


def test_step_cache_is_shared_and_emptied() -> None:
    seen: list[Any] = []

    def on_after_compute_loss(self: Any, context: Any) -> None:
        seen.append(dict(context.step_cache))
        context.step_cache[self.name] = 1

    plugins = [probe(n, on_after_compute_loss=on_after_compute_loss) for n in ("a", "b")]
    manager = _begun(*plugins)
    call_loss(manager)
    call_loss(manager)
    assert seen == [{}, {"a": 1}] * 2


@pytest.mark.parametrize("adds", [{"value": 2.0}, {"value": 2.0, "weight": 0.0}])
def test_the_loss_that_was_returned_must_be_differentiated(adds: Any) -> None:
    manager = _begun(_adds("first", **adds))
    task = loss_of(manager.model)
    returned = call_loss(manager, task)
    task.backward(retain_graph=True)
    with pytest.raises(LifecycleError, match=r"nobody called backward\(\) on the loss that"):
        manager.on_before_optimizer_step()
    (returned / 2).backward()  # as in accumulation, or with a scaler
    manager.on_before_optimizer_step()
    call_loss(manager, loss_of(manager.model))
    with pytest.raises(LifecycleError, match="nobody called backward"):
        manager.on_before_optimizer_step()


def test_a_micro_batch_that_is_left_out_hinders_no_update() -> None:
    manager = _begun(_adds("first", 2.0))
    call_loss(manager).backward()
    call_loss(manager)
    manager.on_before_optimizer_step()


def test_a_weighted_task_loss_must_be_differentiated_as_it_was_returned() -> None:
    def set_weight(self: Any, context: Any) -> None:
        context.set_task_weight(self.name, 0.5)

    manager = _begun(probe(prepare_model=set_weight))
    task = loss_of(manager.model)
    call_loss(manager, task)
    task.backward()
    with pytest.raises(LifecycleError, match="nobody called backward"):
        manager.on_before_optimizer_step()


def test_a_loss_to_which_nothing_is_added_may_be_differentiated_itself() -> None:
    manager = _begun(probe())
    task = loss_of(manager.model)
    call_loss(manager, task)
    task.backward()
    manager.on_before_optimizer_step()


def test_a_loss_without_gradient_is_none_that_must_be_differentiated() -> None:
    manager = _begun(_adds("first", 2.0))
    with torch.no_grad():
        call_loss(manager, loss_of(manager.model))
    manager.on_before_optimizer_step()
