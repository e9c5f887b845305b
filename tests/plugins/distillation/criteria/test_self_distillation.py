"""Self-distillation: shallow heads learn from deep ones, each pair once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import (
    DistillationConfig,
    LinearSchedule,
    SelfKnowledgeDistillationLossConfig,
)
from toy_teachers import begin, published

INPUTS = toys.vectors(8).tensors[0]


class Heads(nn.Module):
    """Three depths with a head each; returns all logits by name, the deepest first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, input):
        outputs = {}
        for depth, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            input = F.relu(block(input))
            outputs[f"depth{depth}"] = head(input)
        return {"logits": outputs["depth2"], **outputs}


def config(mappings, **options):
    return DistillationConfig(criterion=SelfKnowledgeDistillationLossConfig(mappings, **options))


def loss_of(manager, teacher_output=None):
    output = manager.model(INPUTS)
    task = output["logits"].mean() * 0
    return manager.on_after_compute_loss(INPUTS, output, task, teacher_output), output


def kl(student, teacher, temperature):
    student, teacher = (
        value.detach().double().numpy() / temperature for value in (student, teacher)
    )
    log_student, log_teacher = (
        value - np.log(np.exp(value).sum(1, keepdims=True)) for value in (student, teacher)
    )
    divergence = (np.exp(log_teacher) * (log_teacher - log_student)).sum(1)
    return temperature**2 * divergence.mean()


@pytest.mark.parametrize("names", ["depth{}", "heads.{}"])
def test_shallow_learns_from_deep_and_deep_does_not_move(names):
    torch.manual_seed(0)
    model = Heads()
    pairs = [[names.format(depth), names.format(2)] for depth in (0, 1)]
    manager = begin(
        prepare_compression(model, [config([pairs], temperature=3.0, loss_weights=2.0)])
    )
    total, output = loss_of(manager)
    expected = [kl(output[f"depth{depth}"], output["depth2"], 3.0) for depth in (0, 1)]
    values = published(manager)
    for depth in (0, 1):
        term = values[f"loss/distillation/KL/{names.format(depth)}"]
        assert term == pytest.approx(expected[depth], rel=1e-4)
    assert total.item() == pytest.approx(2 * sum(expected), rel=1e-4)
    total.backward()
    assert model.heads[0].weight.grad.abs().sum() > 0
    # Only through the task, whose loss is constant here.
    assert model.heads[2].weight.grad.abs().sum() == 0


def test_three_unit_losses_are_three():
    """Neural Compressor accumulates them to 6."""

    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input):
            zero = torch.zeros(len(input), 2) * self.scale
            return {
                "a": zero,
                "b": zero.clone(),
                "c": zero.clone(),
                "deep": zero + 1,
                "logits": zero,
            }

    mappings = [[["a", "deep"]], [["b", "deep"]], [["c", "deep"]]]
    criterion = config(mappings, loss_types=["MSE"] * 3, loss_weights=[1.0, 1.0, 1.0])
    manager = begin(prepare_compression(Ones(), [criterion]))
    total, _ = loss_of(manager)
    assert total.item() == 3.0


def test_groups_have_a_loss_and_a_weight_each_and_features_are_projected():
    torch.manual_seed(0)
    model = Heads()
    mappings = [[["depth0", "depth2"]], [["blocks.0", "heads.2"]]]
    criterion = config(mappings, loss_types=["KL", "MSE"], loss_weights=[0.5, 0.25])
    manager = prepare_compression(model, [criterion], example_inputs=INPUTS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    total, _ = loss_of(begin(manager))
    values = published(manager)
    expected = (
        0.5 * values["loss/distillation/KL/depth0"]
        + 0.25 * values["loss/distillation/MSE/blocks.0"]
    )
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("origin", [True, False])
def test_groups_share_a_weight_of_one_and_the_task_may_be_left_out(origin):
    groups = [[["depth0", "depth2"]], [["depth1", "depth2"]]]
    model = Heads()
    manager = begin(prepare_compression(model, [config(groups, add_origin_loss=origin)]))
    output = model(INPUTS)
    total = manager.on_after_compute_loss(INPUTS, output, output["logits"].mean() * 0 + 7.0)
    terms = [kl(output[f"depth{depth}"], output["depth2"], 1.0) for depth in (0, 1)]
    assert total.item() == pytest.approx(7.0 * origin + sum(terms) / 2, rel=1e-4)


def test_a_scheduled_temperature_moves_with_the_steps():
    model = Heads()
    schedule = LinearSchedule(4.0, 2.0, 1)
    manager = begin(
        prepare_compression(model, [config([[["depth0", "depth2"]]], temperature=schedule)])
    )
    for step, temperature in enumerate((4.0, 2.0)):
        if step:
            manager.on_step_begin(step)
        total, output = loss_of(manager)
        expected = kl(output["depth0"], output["depth2"], temperature)
        assert total.item() == pytest.approx(expected, rel=1e-3)
        total.backward()
        manager.on_before_optimizer_step()
        manager.on_step_end()


def test_named_outputs_of_the_loop():
    """As in Neural Compressor: the loop passes a mapping of all outputs as teacher_output."""
    model = Heads()
    manager = begin(prepare_compression(model, [config([[["shallow", "deep"]]])]))
    output = model(INPUTS)
    named = {"shallow": output["depth0"], "deep": output["depth2"]}
    total = manager.on_after_compute_loss(INPUTS, output, output["logits"].mean() * 0, named)
    assert total.item() == pytest.approx(kl(output["depth0"], output["depth2"], 1.0), rel=1e-4)


def test_what_the_loop_names_goes_before_what_the_student_returns():
    model = Heads()
    manager = begin(prepare_compression(model, [config([[["depth0", "depth2"]]])]))
    output = model(INPUTS)
    named = {"depth0": output["depth0"] * 2.0, "depth2": output["depth1"]}
    total = manager.on_after_compute_loss(INPUTS, output, output["logits"].mean() * 0, named)
    expected = kl(output["depth0"] * 2.0, output["depth1"], 1.0)
    assert total.item() == pytest.approx(expected, rel=1e-4)


def test_a_name_that_means_nothing_is_refused():
    manager = begin(prepare_compression(Heads(), [config([[["depht0", "depth2"]]])]))
    with pytest.raises(
        ConfigError, match=r"criterion\.layer_mappings: 'depht0' is neither .*did you mean 'depth0'"
    ):
        loss_of(manager)


@pytest.mark.parametrize(
    ("mappings", "message"),
    [
        ([], "must be a list of groups of pairs"),
        ("heads", "must be a list of groups of pairs"),
        (["heads"], r"\[0\] must be a list of pairs, got 'heads'"),
        ([[["a", "b"], 3]], r"\[0\]\[1\]: 3 is no layer mapping"),
        ([[["a", "a"]]], r"\[0\]\[0\]: 'a' would learn from itself"),
        ([["a"]], r"\[0\]\[0\]: 'a' would learn from itself"),
    ],
)
def test_bad_mappings(mappings, message):
    with pytest.raises(ConfigError, match=message):
        SelfKnowledgeDistillationLossConfig(mappings)


def test_a_teacher_has_no_use():
    criterion = SelfKnowledgeDistillationLossConfig([[["a", "b"]]])
    with pytest.raises(ConfigError, match="teacher_model has no use with SelfKnowledge"):
        DistillationConfig(toys.mlp(), criterion)
    with pytest.raises(ConfigError, match="teacher_forward has no use with SelfKnowledge"):
        DistillationConfig(criterion=criterion, teacher_forward=lambda teacher, inputs: inputs)


def test_with_quantization_and_from_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "plugins:\n  qat: {}\n  distillation:\n    criterion:\n      type: self_distillation\n"
        "      layer_mappings: [[[heads.0, heads.2], [heads.1, heads.2]]]\n      temperature: 3\n"
    )
    model = Heads()
    manager = begin(prepare_compression(model, recipe))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        if step:
            manager.on_step_begin(step)
        loss_of(manager)[0].backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        manager.on_step_end()
    int8 = manager.convert()
    assert set(int8(INPUTS)) == {"logits", "depth0", "depth1", "depth2"}
