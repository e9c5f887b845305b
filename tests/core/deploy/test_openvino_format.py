"""Export to OpenVINO: two files that belong together."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy
from compression_manager.deploy import exporting, formats
from compression_manager.errors import ConfigError, ParityError
from compression_manager.integrations.openvino_runtime import shared_core
from quantization_reference import trained

VECTORS = toys.vectors().tensors[0]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return trained(toys.mlp(), VECTORS).convert()


class WrittenOnce:
    """A format that writes what `export` wrote once, so that a test need not translate."""

    def __init__(self, folder: Path) -> None:
        self.model = mlp()
        self.result = deploy.export(self.model, folder / "model.xml", "openvino", VECTORS)
        self.graph = self.result.path.read_bytes()
        self.weights = self.result.path.with_suffix(".bin").read_bytes()

    def write(self, program: object, path: Path) -> None:
        path.write_bytes(self.graph)
        path.with_suffix(".bin").write_bytes(self.weights)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenOnce:
    return WrittenOnce(tmp_path_factory.mktemp("openvino"))


@pytest.fixture
def quick(written: WrittenOnce, monkeypatch: pytest.MonkeyPatch) -> WrittenOnce:
    monkeypatch.setattr(formats.FORMATS["openvino"], "write", written.write)
    return written


def test_graph_and_weights_are_two_files(written: WrittenOnce) -> None:
    path = written.result.path
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.xml"]
    assert written.result.size == len(written.graph) + len(written.weights)
    assert written.result.output_error is not None
    assert written.result.output_error < 1e-5


def test_the_weights_are_integers_and_scales_are_not_halved(written: WrittenOnce) -> None:
    model = shared_core().read_model(written.result.path)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    kinds = {
        tuple(node.shape): node.get_element_type().get_type_name()
        for node in constants
        if len(node.shape) == 2 and min(node.shape) > 1
    }
    assert kinds == {(8, 6): "i8", (4, 8): "i8"}
    assert not any(node.get_element_type().get_type_name() == "f16" for node in constants)


SIGNAL = """
import gc, os, signal, sys, torch
from compression_manager import deploy
path, inputs = sys.argv[1], torch.zeros(2, 6)
first, second = deploy.load_exported(path, int8=False), deploy.load_exported(path, int8=False)
first(inputs), second(inputs)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_models_that_are_gone_leave_a_stack_for_signals(written: WrittenOnce) -> None:
    command = [sys.executable, "-c", SIGNAL, str(written.result.path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "handled\n"


def test_a_loaded_file_takes_any_batch_and_is_called_as_the_model(written: WrittenOnce) -> None:
    run = deploy.load_exported(written.result.path, int8=False)
    assert run.format == "openvino"
    for size in (1, 9):
        inputs = VECTORS.repeat(2, 1)[:size]
        torch.testing.assert_close(run(inputs), written.model(inputs), rtol=0.02, atol=0.02)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return cast(Tensor, self.fc(left)) + right


def test_sizes_may_be_fixed_or_open_in_several_inputs(tmp_path: Path) -> None:
    inputs, path = (VECTORS[:3], torch.randn(3, 4)), tmp_path / "model.xml"
    model = trained(Sum(), inputs).convert()
    for dynamic_batch, message in (
        (True, "'left' and 'right' must hold equally many samples, .* got 1 and 3"),
        (False, r"takes left of the sizes \(3, 6\), got \(1, 6\)"),
    ):
        deploy.export(model, path, "openvino", inputs, dynamic_batch=dynamic_batch)
        run = deploy.load_exported(path, int8=False)
        torch.testing.assert_close(run(*inputs), model(*inputs), rtol=0.02, atol=0.02)
        with pytest.raises(ConfigError, match=message):
            run(VECTORS[:1], inputs[1])


def test_a_pair_replaces_an_older_one(quick: WrittenOnce, tmp_path: Path) -> None:
    graph, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    graph.write_text("older")
    weights.write_text("older")
    deploy.export(quick.model, graph, "openvino", VECTORS)
    assert graph.read_bytes() == quick.graph
    assert weights.read_bytes() == quick.weights
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_between_the_files_leaves_no_mixed_pair(
    quick: WrittenOnce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    graph.write_text("older")
    weights.write_text("older")
    replace = exporting.os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).suffix == ".xml":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(exporting.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        deploy.export(quick.model, graph, "openvino", VECTORS)
    assert weights.read_bytes() == quick.weights
    assert not graph.exists()


def test_a_pair_that_computes_something_else_is_not_left(
    quick: WrittenOnce, tmp_path: Path
) -> None:
    other = mlp()
    with torch.no_grad():
        other.state_dict()["2.weight"].zero_()
    with pytest.raises(ParityError, match=r"the openvino file at batch size .* relative error"):
        deploy.export(other, tmp_path / "model.xml", "openvino", VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_replaced_leave_the_older_graph(
    quick: WrittenOnce, tmp_path: Path
) -> None:
    graph = tmp_path / "model.xml"
    graph.write_text("older")
    (tmp_path / "model.bin").mkdir()
    with pytest.raises(ConfigError, match=r"model\.bin is something else"):
        deploy.export(quick.model, graph, "openvino", VECTORS)
    assert graph.read_text() == "older"


@pytest.mark.parametrize("activation", [{}, {"activation": None}], ids=["int8", "weight only"])
def test_inputs_that_stay_in_float32_are_not_quantized_by_the_runtime(
    activation: dict[str, None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    inputs = torch.randn(16, 64)
    converted = trained(model, inputs, **activation).convert()
    deploy.export(converted, tmp_path / "model.xml", "openvino", inputs)
    run = deploy.load_exported(tmp_path / "model.xml", int8=False)
    with torch.no_grad():
        expected = converted(inputs)
    assert (run(inputs) - expected).norm() <= 1e-4 * expected.norm()


def test_threads_share_a_loaded_model(written: WrittenOnce) -> None:
    run = deploy.load_exported(written.result.path, int8=False)
    batches = [VECTORS * factor for factor in (1.0, 2.0, 3.0, 4.0)]
    expected = [run(batch) for batch in batches]
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(200):
            if not torch.equal(run(batches[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inputs_of_another_dtype_are_refused(written: WrittenOnce) -> None:
    run = deploy.load_exported(written.result.path)
    with pytest.raises(ConfigError, match="takes input as float32, got float64"):
        run(VECTORS.double())


class Ignoring(nn.Module):
    """Takes three inputs and reads the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear(x)
        return output


def test_inputs_that_the_model_does_not_read_are_taken(tmp_path: Path) -> None:
    examples = (torch.arange(len(VECTORS)), VECTORS, torch.ones(len(VECTORS), 2) > 0)
    converted = trained(Ignoring(), examples).convert()
    deploy.export(converted, tmp_path / "model.xml", "openvino", examples)
    run = deploy.load_exported(tmp_path / "model.xml", int8=False)
    expected = converted(*examples)
    torch.testing.assert_close(run(*examples), expected)
    ids, x, mask = examples
    torch.testing.assert_close(run(mask=mask, x=x, ids=ids), expected)
    result = deploy.fastest(converted, examples, routes=["openvino"], rounds=1)
    assert all(row.left_out is None for row in result.results), result


@pytest.mark.parametrize(
    ("first", "shape"),
    [
        (nn.Conv2d(1, 8, 3, padding=3), (4, 1, 12, 12)),
        (nn.Conv3d(1, 8, 3, padding=1), (4, 1, 1, 9, 9)),
    ],
)
def test_convolutions_that_read_padding_only(
    first: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    converted = trained(nn.Sequential(first, nn.Flatten(), nn.LazyLinear(3)), inputs).convert()
    path = deploy.export(converted, tmp_path / "model.xml", "openvino", inputs).path
    with torch.no_grad():
        expected = converted(inputs)
    torch.testing.assert_close(deploy.load_exported(path)(inputs), expected, rtol=0.02, atol=0.02)


class OverTheBatch(nn.Module):
    """Convolves over the samples, whose number is open."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(6, 3, 3, padding=1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.convolution(input.t().unsqueeze(0)).squeeze(0).t()


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch.export bounds such a batch there")
def test_a_convolution_over_an_axis_of_any_length(tmp_path: Path) -> None:
    converted = trained(OverTheBatch(), VECTORS).convert()
    path = deploy.export(converted, tmp_path / "model.xml", "openvino", VECTORS).path
    with torch.no_grad():
        expected = converted(VECTORS[:5])
    output = deploy.load_exported(path)(VECTORS[:5])
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
