"""Loops as Neural Compressor 2.6's examples write them, with the hooks that those leave out."""

import copy
import gc
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import optimizer as torch_optimizer

import toys
from compression_manager import LifecycleError
from compression_manager.deploy import ConvertedLinear
from compression_plugins import CheckpointConfig
from compression_plugins.compat.neural_compressor import (
    CallBacks,
    CompressionManager,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    QuantizationAwareTrainingConfig,
    SelfKnowledgeDistillationLossConfig,
    load,
    prepare_compression,
)

INPUTS, TARGETS = toys.vectors(16).tensors
BATCHES = [(INPUTS[:8], TARGETS[:8]), (INPUTS[8:], TARGETS[8:])]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["callbacks", "manager"])
def hooks_of(request):
    """Return where the loop finds the hooks: both places are 2.6's."""
    if request.param == "manager":
        return lambda manager: manager
    return lambda manager: manager.callbacks


def distiller(teacher=None, **options):
    return DistillationConfig(
        teacher or toys.mlp(), KnowledgeDistillationLossConfig(loss_types=["CE", "KL"], **options)
    )


def by_layers(teacher, mappings):
    return DistillationConfig(
        teacher, IntermediateLayersKnowledgeDistillationLossConfig(mappings, add_origin_loss=True)
    )


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def is_int8(model):
    return any(isinstance(module, ConvertedLinear) for module in model.modules())


# With all hooks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_the_full_loop_of_the_documentation(hooks_of, order):
    student = toys.mlp()
    before = weights(student)
    manager = prepare_compression(
        model=student, confs=[distiller(), QuantizationAwareTrainingConfig()][::order]
    )
    hooks, model = hooks_of(manager), manager.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks.on_train_begin()
    for epoch in range(2):
        model.train()
        hooks.on_epoch_begin(epoch)
        for step, (inputs, targets) in enumerate(BATCHES):
            hooks.on_step_begin(step)
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            loss = hooks.on_after_compute_loss(inputs, output, loss)
            optimizer.zero_grad()
            loss.backward()
            hooks.on_before_optimizer_step()
            optimizer.step()
            hooks.on_after_optimizer_step()
            hooks.on_step_end()
        hooks.on_before_eval()
        model.eval()
        model(INPUTS)
        hooks.on_after_eval()
        hooks.on_epoch_end()
    assert manager.native.position.global_step == 4
    hooks.on_train_end()
    assert manager.model is model
    assert is_int8(manager.model)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))


# With hooks left out ------------------------------------------------------------------------------


def test_a_distillation_loop_with_begins_and_losses_only(hooks_of):
    manager = prepare_compression(toys.mlp(), distiller())
    hooks, model = hooks_of(manager), manager.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    hooks.on_train_begin()
    for _ in range(2):
        for step, (inputs, targets) in enumerate(BATCHES):
            hooks.on_step_begin(step)
            output = model(inputs)
            loss = hooks.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        hooks.on_epoch_end()  # without a begin, as there
    assert manager.native.position.global_step == 4
    assert not torch.equal(before[0], weights(model)[0])
    manager.close()


def test_a_loop_without_train_begin_and_end_whose_steps_count_from_one():
    manager = prepare_compression(toys.mlp(), distiller())
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1)
    for epoch in range(2):
        manager.callbacks.on_epoch_begin(epoch)
        for number, (inputs, targets) in enumerate(BATCHES):
            manager.callbacks.on_step_begin(number + 1)
            output = manager.model(inputs)
            loss = torch.zeros(1) + F.cross_entropy(output, targets)
            loss = manager.callbacks.on_after_compute_loss(inputs, output, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            manager.callbacks.on_step_end()
        manager.callbacks.on_epoch_end()
    assert manager.native.position.global_step == 4
    manager.close()


def test_a_quantization_loop_without_hooks_in_the_steps():
    manager = prepare_compression(toys.mlp(), QuantizationAwareTrainingConfig())
    manager.callbacks.on_train_begin()
    model = manager.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        for inputs, targets in BATCHES:
            output = model(inputs)
            optimizer.zero_grad()
            F.cross_entropy(output, targets).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(INPUTS)
    assert manager.native.position.global_step == 4
    manager.callbacks.on_train_end()
    assert is_int8(model)


def test_a_quantization_loop_with_all_hooks_but_the_loss_and_an_evaluation_after_it():
    student = toys.mlp()
    manager = prepare_compression(student, QuantizationAwareTrainingConfig())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    manager.callbacks.on_train_begin()
    for epoch in range(2):
        student.train()
        manager.callbacks.on_epoch_begin(epoch)
        for step, (inputs, targets) in enumerate(BATCHES):
            manager.callbacks.on_step_begin(step)
            loss = F.cross_entropy(student(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            manager.callbacks.on_before_optimizer_step()
            optimizer.step()
            manager.callbacks.on_after_optimizer_step()
            manager.callbacks.on_step_end()
        manager.callbacks.on_epoch_end()
    assert manager.native.position.global_step == 4
    manager.callbacks.on_train_end()
    manager.callbacks.on_before_eval()
    manager.callbacks.on_after_eval()
    assert is_int8(manager.model)


class Exits(nn.Module):
    """Returns the logits and features of three depths, the deepest first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, toys.CLASSES) for _ in range(3))

    def forward(self, values):
        features = []
        for block in self.blocks:
            values = F.relu(block(values))
            features.insert(0, values)
        heads = reversed(list(self.heads))
        return [head(item) for head, item in zip(heads, features, strict=True)], features


def test_self_distillation_with_layers_that_the_loop_adds(tmp_path):
    network = Exits()
    criterion = SelfKnowledgeDistillationLossConfig(
        layer_mappings=[
            [["middle.feature", "deep.feature"], ["shallow.feature", "deep.feature"]],
            [["middle.fc", "deep.fc"], ["shallow.fc", "deep.fc"]],
        ],
        temperature=3.0,
        loss_types=["L2", "KL"],
        loss_weights=[0.03, 0.3],
        add_origin_loss=True,
    )
    conf = DistillationConfig(teacher_model=network, criterion=criterion)
    manager = prepare_compression(copy.deepcopy(network), conf)
    model = manager.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(5):
        model.train()
        manager.callbacks.on_epoch_begin(epoch)
        for number, (inputs, targets) in enumerate(BATCHES, start=1):
            manager.callbacks.on_step_begin(number)
            logits, features = model(inputs)
            if not hasattr(model, "adaptation"):
                model.adaptation = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
            loss = torch.zeros(1)
            for item in logits:
                loss += F.cross_entropy(item, targets)
            named = {
                "deep.feature": features[0].detach(),
                "middle.feature": model.adaptation[0](features[1]),
                "shallow.feature": model.adaptation[1](features[2]),
                "deep.fc": logits[0].detach(),
                "middle.fc": logits[1],
                "shallow.fc": logits[2],
            }
            loss = manager.callbacks.on_after_compute_loss(
                inputs, named, loss, teacher_output=named
            )
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            manager.callbacks.on_step_end()
        manager.callbacks.on_epoch_end()
    assert losses[-1] < losses[0]
    manager.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", Exits())
    assert torch.equal(loaded(INPUTS)[0][0], model.eval()(INPUTS)[0][0])
    manager.close()


def test_a_loop_with_the_loss_alone():
    teacher = toys.mlp()
    manager = prepare_compression(toys.mlp(), by_layers(teacher, [["0"]]))
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1)
    manager.on_train_begin()
    for inputs, targets in BATCHES:
        output = manager.model(inputs)
        task = F.cross_entropy(output, targets)
        loss = manager.on_after_compute_loss(inputs, output, task)
        feature = F.mse_loss(manager.model.model[0](inputs), teacher[0](inputs))
        torch.testing.assert_close(loss, task + feature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert manager.native.position.global_step == 2
    manager.on_train_end()


@pytest.mark.parametrize("every", [2, 3])
def test_accumulated_gradients_train_projections_from_the_first_update(every):
    manager = prepare_compression(toys.mlp(5), by_layers(toys.mlp(9), [["0"]]))
    model = manager.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.on_train_begin()
    for step, (inputs, targets) in enumerate(BATCHES * every):
        manager.on_step_begin(step)
        output = model(inputs)
        loss = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
        (loss / every).backward()
        if (step + 1) % every == 0:
            manager.on_before_optimizer_step()
            (projection,) = [group for group in optimizer.param_groups if group.get("name")] or [
                {"params": []}
            ]
            before = [item.detach().clone() for item in projection["params"]]
            optimizer.step()
            optimizer.zero_grad()
        manager.on_step_end()
    assert before
    after = optimizer.param_groups[1]["params"]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert manager.native.position.global_step == 2
    manager.on_train_end()
    assert len(optimizer.param_groups) == 1


def _exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def _sequential(optimizer):
    parts = [_exponential(optimizer), _exponential(optimizer)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


@pytest.mark.parametrize("make", [_exponential, _sequential])
def test_projections_join_an_optimizer_that_has_a_scheduler_already(make):
    manager = prepare_compression(toys.mlp(5), by_layers(toys.mlp(9), [["0"]]))
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1)
    scheduler = make(optimizer)
    manager.on_train_begin()
    for step, (inputs, targets) in enumerate(BATCHES * 2):
        manager.on_step_begin(step)
        output = manager.model(inputs)
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    manager.on_step_begin(4)  # rates are followed when a step has ended
    first, projections = optimizer.param_groups
    assert 0 < projections["lr"] == first["lr"] < 0.1
    manager.on_train_end()
    scheduler.step()
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_of_ones_own_is_announced_by_the_hooks(monkeypatch):
    manager = prepare_compression(toys.mlp(), QuantizationAwareTrainingConfig())
    model, announced = manager.model, []
    announce = manager.native.on_before_optimizer_step
    monkeypatch.setattr(
        manager.native,
        "on_before_optimizer_step",
        lambda: (announced.append(len(announced)), announce()),
    )
    manager.on_train_begin()
    for step, (inputs, targets) in enumerate(BATCHES * 2):
        manager.on_step_begin(step)
        output = model(inputs)
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
        manager.on_before_optimizer_step()
        # The first waits, because a torch optimizer might follow.
        assert len(announced) == (0 if step == 0 else step + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        manager.on_step_end()
    assert manager.native.position.global_step == 4
    manager.on_train_end()
    assert is_int8(model)


def test_a_closure_computes_the_loss_within_the_update():
    manager = prepare_compression(toys.mlp(), [distiller(), QuantizationAwareTrainingConfig()])
    optimizer = torch.optim.LBFGS(manager.model.parameters(), lr=0.1, max_iter=2)
    manager.on_train_begin()
    for step in range(3):
        manager.on_step_begin(step)

        def closure():
            optimizer.zero_grad()
            output = manager.model(INPUTS)
            task = F.cross_entropy(output, TARGETS)
            loss = manager.on_after_compute_loss(INPUTS, output, task)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert manager.native.position.global_step == 3
    manager.on_train_end()
    assert is_int8(manager.model)


def test_evaluation_in_the_middle_of_an_open_step():
    manager = prepare_compression(toys.mlp(), distiller())
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1)
    manager.on_train_begin()
    for step, (inputs, targets) in enumerate(BATCHES):
        manager.on_step_begin(step)
        output = manager.model(inputs)
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
        optimizer.step()
        manager.on_before_eval()
        manager.on_after_eval({"accuracy": 0.5})
    assert [item["metrics"] for item in manager.native.evaluations] == [{"accuracy": 0.5}] * 2
    manager.on_after_eval()
    manager.on_train_end()


def test_the_hooks_of_both_places_are_the_same():
    manager = prepare_compression(toys.mlp(), distiller())
    assert isinstance(manager, CompressionManager)
    assert isinstance(manager.callbacks, CallBacks)
    hooks = [name for name in dir(CallBacks) if name.startswith("on_")]
    assert len(hooks) == 11
    assert all(getattr(manager, name) == getattr(manager.callbacks, name) for name in hooks)
    manager.close()


@pytest.mark.parametrize("next_hook", ["on_step_begin", "on_epoch_begin", "on_train_end"])
def test_an_evaluation_whose_end_is_left_out(next_hook):
    manager = prepare_compression(toys.mlp(), distiller())
    manager.on_train_begin()
    manager.on_before_eval()
    getattr(manager, next_hook)(*() if next_hook == "on_train_end" else (0,))
    assert len(manager.native.evaluations) == 1
    manager.close()


# What was wrong there -----------------------------------------------------------------------------


def test_training_begins_once():
    manager = prepare_compression(toys.mlp(), distiller())
    manager.on_train_begin()
    with pytest.raises(LifecycleError, match="twice"):
        manager.callbacks.on_train_begin()
    manager.close()


def test_training_does_not_go_on_after_its_end():
    manager = prepare_compression(toys.mlp(), distiller())
    manager.on_train_begin()
    manager.on_train_end()
    with pytest.raises(LifecycleError, match="closed manager"):
        manager.on_train_begin()
    with pytest.raises(LifecycleError):
        manager.on_step_begin(0)


@pytest.mark.parametrize("announces", [False, True])
def test_an_optimizer_of_another_copy_is_noticed(announces):
    student = toys.mlp()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    manager = prepare_compression(copy.deepcopy(student), distiller())
    manager.on_train_begin()
    for step, (inputs, targets) in enumerate(BATCHES):
        manager.on_step_begin(step)
        output = manager.model(inputs)
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
        if announces:
            manager.on_before_optimizer_step()
        optimizer.step()
        manager.on_step_end()
    with pytest.warns(UserWarning, match="holds no parameter of manager.model"):
        manager.on_epoch_end()
    manager.close()


def test_a_second_optimizer_beside_the_students_is_no_mistake():
    manager = prepare_compression(toys.mlp(), distiller())
    other = torch.optim.SGD(toys.mlp().parameters(), lr=0.1)
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1)
    manager.on_train_begin()
    for step, (inputs, targets) in enumerate(BATCHES):
        manager.on_step_begin(step)
        output = manager.model(inputs)
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
        other.step()
        optimizer.step()
    manager.on_epoch_end()
    assert manager.native.position.global_step == 2
    manager.on_train_end()


@pytest.mark.parametrize("ends", ["on_train_end", "close"])
def test_no_hook_stays(ends):
    # One of the library's own watches the optimizers of the whole process.
    others = dict(torch_optimizer._global_optimizer_post_hooks)
    student, teacher = toys.mlp(5), toys.mlp(9)
    teacher.train()
    manager = prepare_compression(student, by_layers(teacher, [["0"]]))
    manager.on_train_begin()
    getattr(manager, ends)()
    modules = [*student.modules(), *teacher.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert dict(torch_optimizer._global_optimizer_post_hooks) == others
    assert teacher.training


def test_a_forgotten_manager_does_not_live_on_in_the_optimizers_hooks():
    manager = prepare_compression(toys.mlp(), distiller())
    manager.on_train_begin()
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    assert not torch_optimizer._global_optimizer_pre_hooks


def test_two_managers_at_the_same_time_keep_their_own_features():
    teachers = [toys.mlp(), toys.mlp()]
    managers = [prepare_compression(toys.mlp(), by_layers(item, [["0"]])) for item in teachers]
    for manager in managers:
        manager.on_train_begin()
        manager.on_step_begin(0)
    outputs = [manager.model(INPUTS) for manager in managers]
    for manager, teacher, output in zip(managers, teachers, outputs, strict=True):
        loss = manager.on_after_compute_loss(INPUTS, output, torch.zeros(()))
        expected = F.mse_loss(manager.model.model[0](INPUTS), teacher[0](INPUTS))
        torch.testing.assert_close(loss, expected)
        manager.close()


def test_the_environment_keeps_its_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    prepare_compression(toys.mlp(), QuantizationAwareTrainingConfig()).close()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_training_resumes_through_the_native_manager(tmp_path):
    torch.manual_seed(1)
    teacher, start = toys.mlp(), toys.mlp()

    def run(epochs, resumes):
        confs = [
            distiller(teacher),
            QuantizationAwareTrainingConfig(),
            CheckpointConfig(tmp_path, save_every_epochs=1),
        ]
        manager = prepare_compression(copy.deepcopy(start), confs)
        optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.1, momentum=0.9)
        manager.track(optimizer=optimizer)
        first = manager.native.resume(tmp_path).epoch if resumes else 0
        manager.on_train_begin()
        for epoch in range(first, epochs):
            manager.on_epoch_begin(epoch)
            for step, (inputs, targets) in enumerate(BATCHES):
                manager.on_step_begin(step)
                output = manager.model(inputs)
                task = F.cross_entropy(output, targets)
                manager.on_after_compute_loss(inputs, output, task).backward()
                optimizer.step()
                optimizer.zero_grad()
            manager.on_epoch_end()
        state = manager.native.state_dict()["model"]
        result = {name: value.clone() for name, value in state.items()}
        manager.close()
        return result

    run(1, resumes=False)
    resumed = run(2, resumes=True)
    for path in tmp_path.iterdir():
        path.rename(tmp_path.parent / f"{tmp_path.name}-{path.name}")
    whole = run(2, resumes=False)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_copy_of_the_model_leaves_the_manager_behind():
    manager = prepare_compression(toys.mlp(), [distiller(), QuantizationAwareTrainingConfig()])
    manager.on_train_begin()
    copied = copy.deepcopy(manager.model)
    position = manager.native.position
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    copied(INPUTS).sum().backward()
    optimizer.step()
    assert manager.native.position == position
    assert isinstance(copied, nn.Module)
    manager.close()


def test_plugins_hear_of_an_exception_in_the_block(monkeypatch):
    manager = prepare_compression(toys.mlp(), distiller())
    heard, abort = [], manager.native._abort
    monkeypatch.setattr(
        manager.native, "_abort", lambda error: (heard.append(str(error)), abort(error))
    )
    with pytest.raises(RuntimeError, match="in the loop"), manager:
        raise RuntimeError("in the loop")
    assert heard == ["in the loop"]
