"""Graphs of the quantized teacher: torch.export and torch.compile."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim

import toys
from compression_manager import ConfigError, NotExportableError
from compression_plugins import QuantizedTeacher
from toy_teachers import condition

FIXED = [{"scale": 0.1}, {"symmetric": False, "scale": 0.1, "zero_point": -3}, {"bits": 32}]
DYNAMIC = "dynamic=True.*has no fixed parameters to export; make one with a fixed range"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TwoInputs(nn.Module):
    """Logits in a mapping, from inputs by position or by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = toys.mlp()

    def forward(self, values, mask=None):
        return {"hidden": values, "logits": self.inner(values if mask is None else values * mask)}


class DataDependent(nn.Module):
    def forward(self, values):
        return values if values.sum() > 0 else -values


def quantizations(program):
    return [node for node in program.graph.nodes if "fake_quantize" in str(node.target)]


@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
@pytest.mark.parametrize("options", FIXED)
def test_export_graph_computes_the_same_for_every_batch_size(options):
    teacher = QuantizedTeacher(toys.ConvNet(dropout=0.5), **options)
    program = teacher.export_graph(torch.randn(2, 1, 8, 8))
    assert isinstance(program, torch.export.ExportedProgram)
    assert len(quantizations(program)) == 1
    for size in (1, 2, 9):
        inputs = torch.randn(size, 1, 8, 8)
        assert torch.equal(program.module()(inputs), teacher(inputs))


@pytest.mark.parametrize("shapes", [({0: Dim("batch")},), {"input": {0: Dim("batch")}}])
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_traces_it_with_a_dynamic_batch(strict, shapes):
    teacher = QuantizedTeacher(toys.mlp(), scale=0.1)
    program = torch.export.export(
        teacher, (torch.randn(2, 6),), dynamic_shapes=shapes, strict=strict
    )
    inputs = torch.randn(7, 6)
    assert torch.equal(program.module()(inputs), teacher(inputs))


def test_example_inputs_by_position_and_by_keyword_without_labels():
    teacher = QuantizedTeacher(TwoInputs(), scale=0.1)
    values, mask = torch.randn(7, 6), torch.rand(7, 1)
    expected = teacher(values, mask)
    pair = teacher.export_graph((torch.randn(3, 6), torch.ones(3, 1)))
    assert torch.equal(pair.module()(values, mask), expected)
    example = {"mask": torch.ones(3, 1), "values": torch.randn(3, 6), "labels": torch.ones(3)}
    by_name = teacher.export_graph(example)
    assert torch.equal(by_name.module()(mask=mask, values=values), expected)
    assert "labels" in example


def test_only_what_has_the_length_of_the_batch_varies():
    teacher = QuantizedTeacher(TwoInputs(), scale=0.1)
    program = teacher.export_graph((torch.randn(3, 6), torch.ones(6)))
    values, mask = torch.randn(5, 6), torch.rand(6)
    assert torch.equal(program.module()(values, mask), teacher(values, mask))


def test_a_fixed_batch_is_on_request():
    teacher = QuantizedTeacher(toys.mlp(), scale=0.1)
    program = teacher.export_graph(torch.randn(1, 6), dynamic_batch=False)
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.randn(2, 6))


@pytest.mark.parametrize("example", [torch.randn(1, 6), torch.randn(0, 6), None, ()])
def test_a_batch_that_shall_vary_needs_two_examples(example):
    with pytest.raises(ConfigError, match=r"at least 2 examples.*dynamic_batch=False"):
        QuantizedTeacher(toys.mlp()).export_graph(example)


def test_exporting_changes_nothing_and_needs_no_mode():
    model, inputs = toys.ConvNet(dropout=0.5), torch.randn(4, 1, 8, 8)
    teacher = QuantizedTeacher(model, scale=0.1)
    expected, before = teacher(inputs), copy.deepcopy(model.state_dict())
    model.train()
    program = teacher.export_graph(inputs)
    assert torch.equal(program.module()(inputs), expected)
    toys.assert_identical(model.state_dict(), before)
    assert condition(model) == condition(copy.deepcopy(model).eval())


def test_a_teacher_that_cannot_be_traced_is_named_with_its_cause():
    teacher = QuantizedTeacher(DataDependent())
    with pytest.raises(NotExportableError, match="control flow must not depend on values") as error:
        teacher.export_graph(torch.randn(2, 6))
    assert error.value.__cause__ is not None


# Dynamic ranges -----------------------------------------------------------------------------------


def test_supports_export_tells_which():
    assert QuantizedTeacher(toys.mlp()).supports_export
    assert not QuantizedTeacher(toys.mlp(), dynamic=True).supports_export


@pytest.mark.parametrize(
    "export",
    [
        lambda teacher, inputs: teacher.export_graph(inputs),
        lambda teacher, inputs: torch.export.export(teacher, (inputs,)),
        lambda teacher, inputs: torch.export.export(teacher, (inputs,), strict=True),
        lambda teacher, inputs: torch.export.export(nn.Sequential(teacher), (inputs,)),
    ],
)
def test_a_dynamic_range_is_not_exportable(export):
    teacher, inputs = QuantizedTeacher(toys.mlp(), dynamic=True), torch.randn(2, 6)
    expected = teacher(inputs)
    with pytest.raises(NotExportableError, match=DYNAMIC):
        export(teacher, inputs)
    assert torch.equal(teacher(inputs), expected)


# torch.compile ------------------------------------------------------------------------------------


# Dynamo itself instantiates the context class of autograd functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
@pytest.mark.parametrize("options", [*FIXED, {"dynamic": True}])
def test_compiles_into_one_graph_with_the_same_values_and_gradients(options):
    torch.compiler.reset()
    teacher = QuantizedTeacher(toys.mlp(), **options)
    compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    inputs = 20 * torch.randn(5, 6)
    results = []
    for run in (teacher, compiled):
        leaf = inputs.clone().requires_grad_()
        output = run(leaf)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad))
    toys.assert_identical(results[1], results[0])


def test_compiles_once_for_changing_batch_sizes_modes_and_after_the_first_output():
    torch.compiler.reset()
    model = toys.ConvNet(dropout=0.5)
    teacher = QuantizedTeacher(model, scale=0.1, output_dimension=4)
    compiled = torch.compile(teacher, fullgraph=True, backend="eager", dynamic=True)
    for size in (3, 4, 5):
        inputs = torch.randn(size, 1, 8, 8)
        assert torch.equal(compiled(inputs), teacher(inputs))
        model.train()
    assert torch.equal(compiled(inputs), teacher(inputs))
