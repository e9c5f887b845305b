"""`export` of models with outputs of every form: their names, and what comes back of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten

import toys
from compression_manager import deploy
from compression_manager.errors import NotExportableError
from compression_manager.integrations.onnx_export import to_onnx
from compression_manager.integrations.onnx_runtime import load_onnx
from compression_manager.integrations.openvino_runtime import shared_core
from compression_manager.tracing.program import trace

VECTORS = toys.vectors().tensors[0]


class Head(nn.Module):
    """Returns what `form` makes of two tensors, of which the second one is its input."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 4)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.fc(x), x)


class Pair(NamedTuple):
    first: Tensor
    rest: list[Any]


@dataclass
class Record:
    logits: Tensor
    mask: Tensor | None = None


torch.export.register_dataclass(Record)


class Box:
    """Of a class of the user's, which torch was told how to take apart."""

    def __init__(self, content: Tensor) -> None:
        self.content = content


register_pytree_node(Box, lambda box: ([box.content], None), lambda items, context: Box(*items))

FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "tensor": (lambda y, x: y, ["output"]),
    "tuple": (lambda y, x: (y, y + 1), ["output.0", "output.1"]),
    "list of one": (lambda y, x: [y], ["output.0"]),
    "mapping": (
        lambda y, x: {"cls": y, "box": [y + 1, (y + 2,)], "deep": {"a": {"b": y - 1}}, 3: y * 2},
        ["cls", "box.0", "box.1.0", "deep.a.b", "3"],
    ),
    "constants": (
        lambda y, x: {"y": y, "none": None, "rest": [2, 0.5, True, "text", float("inf")]},
        ["y"],
    ),
    "one tensor twice": (lambda y, x: {"a": y, "b": y}, ["a", "b"]),
    "names of values within": (
        lambda y, x: {"linear": y.relu(), "relu": y.sigmoid(), "fc.weight": y + 1},
        ["linear", "relu", "fc.weight"],
    ),
    "an input, and its name": (lambda y, x: {"y": x, "x": y}, ["y", "x_1"]),
    "names that meet": (
        lambda y, x: {"a": {"b": y}, "a.b": y + 1, "": y + 2, "output": y + 3},
        ["a.b", "a.b_1", "output", "output_1"],
    ),
}


def named(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path).graph
    return [item.name for item in graph.input], [item.name for item in graph.output]


def assert_same(actual: Any, expected: Any) -> None:
    """Equal classes, keys, and all but the last digits of tensors."""
    leaves, structure = tree_flatten(actual)
    others, wanted = tree_flatten(expected)
    assert structure == wanted
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(leaf, other, rtol=1e-4, atol=1e-4)
        else:
            assert (type(leaf), leaf) == (type(other), other)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_named_by_their_place_and_come_back_as_they_were(
    form: str, tmp_path: Path
) -> None:
    make, names = FORMS[form]
    model, path = Head(make), tmp_path / "model.onnx"
    deploy.export(model, path, "onnx", VECTORS)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert named(path) == (["x"], names)
    with torch.no_grad():
        assert_same(deploy.load_exported(path, int8=False)(VECTORS[:3]), model(VECTORS[:3]))


@pytest.mark.parametrize("form", ["tensor", "mapping", "constants", "an input, and its name"])
def test_openvino_has_the_same_names_and_structures(form: str, tmp_path: Path) -> None:
    make, names = FORMS[form]
    model, path = Head(make), tmp_path / "model.xml"
    deploy.export(model, path, "openvino", VECTORS)
    network = shared_core().read_model(path)
    assert [item.get_any_name() for item in network.outputs] == names
    with torch.no_grad():
        assert_same(deploy.load_exported(path, int8=False)(VECTORS[:3]), model(VECTORS[:3]))


@pytest.mark.parametrize(
    ("make", "kind", "names"),
    [
        (lambda y, x: OrderedDict(z=y, a=[y + 1]), dict, ["z", "a.0"]),
        (lambda y, x: Record(y, y + 1), dict, ["logits", "mask"]),
        (lambda y, x: Record(y), dict, ["logits"]),
        (lambda y, x: Pair(y, [None, y + 1]), tuple, ["first", "rest.1"]),
    ],
    ids=["OrderedDict", "dataclass", "dataclass with None", "named tuple"],
)
def test_other_classes_come_back_as_the_built_in_one_that_holds_the_same(
    make: Callable[[Tensor, Tensor], Any], kind: type, names: list[str], tmp_path: Path
) -> None:
    model, path = Head(make), tmp_path / "model.onnx"
    deploy.export(model, path, "onnx", VECTORS)
    assert named(path)[1] == names
    output = deploy.load_exported(path, int8=False)(VECTORS[:3])
    with torch.no_grad():
        expected = model(VECTORS[:3])
    assert type(output) is kind
    plain = vars(expected) if isinstance(expected, Record) else kind(expected)
    assert_same(output, plain)


def test_a_file_that_knows_no_structure_returns_a_tensor_or_a_tuple() -> None:
    """As those did that were written before."""
    for make, count in ((lambda y, x: {"a": y}, 1), (lambda y, x: {"a": y, "b": [None, y]}, 2)):
        model = Head(make)
        proto = onnx.load_from_string(to_onnx(trace(model, VECTORS)))
        notes = {note.key: note for note in proto.metadata_props}
        proto.metadata_props.remove(notes["compression_manager.outputs"])
        output = load_onnx(proto.SerializeToString(), int8=False)(VECTORS)
        expected = model(VECTORS)["a"].detach()
        assert_same(output, expected if count == 1 else (expected, expected))


def test_nothing_is_said_about_constants(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    deploy.export(Head(FORMS["constants"][0]), tmp_path / "model.onnx", "onnx", VECTORS)
    assert capfd.readouterr().err == "exporting model.onnx (onnx) ...\n"
    assert "constant" not in caplog.text
    assert "None" not in caplog.text


def test_nothing_is_said_about_weights_that_are_returned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Head(lambda y, x: (y, model.fc.weight)).requires_grad_(False)
    deploy.export(model, tmp_path / "model.onnx", "onnx", VECTORS)
    assert "initializer" not in caplog.text


def test_what_cannot_come_back_is_named(tmp_path: Path) -> None:
    model = Head(lambda y, x: {"y": y, "beside": [Box(y)]})
    message = r"the model returns a Box as beside\.0; what ONNX and OpenVINO return is tensors, "
    with pytest.raises(NotExportableError, match=message):
        deploy.export(model, tmp_path / "model.onnx", "onnx", VECTORS)


def test_a_number_that_follows_the_batch_is_refused_where_the_batch_is_open(tmp_path: Path) -> None:
    model = Head(lambda y, x: {"y": y, "count": y.shape[0]})
    with pytest.raises(NotExportableError, match=r"as count; .*dynamic_batch=False"):
        deploy.export(model, tmp_path / "model.onnx", "onnx", VECTORS)
    deploy.export(model, tmp_path / "model.onnx", "onnx", VECTORS, dynamic_batch=False)
    output = deploy.load_exported(tmp_path / "model.onnx", int8=False)(VECTORS)
    assert output["count"] == len(VECTORS)
