"""`export` of models with inputs of every form, and of sizes that vary or do not."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy
from compression_manager.errors import (
    ConfigError,
    NotExportableError,
)
from exported_files import FORMATS, IMAGES, SUFFIX, VECTORS, load
from quantization_reference import trained


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("unused", torch.zeros(1))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.fc(x) + (0 if bias is None else bias)
        result = {"logits": logits, "best": logits.argmax(1)}
        return result if labels is None else {**result, "loss": (logits[:, 0] - labels).mean()}


@pytest.mark.parametrize("format", FORMATS)
def test_a_mapping_goes_by_name_and_without_labels(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": VECTORS, "bias": torch.randn(4), "labels": torch.zeros(len(VECTORS))}
    model = trained(Keywords(), inputs).convert()
    result = deploy.export(model, tmp_path / f"model{SUFFIX[format]}", format, inputs)
    run = load(result.path, format)
    logits, best = run({"bias": inputs["bias"], "x": VECTORS[:3]})
    expected = model(VECTORS[:3], inputs["bias"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0.02, atol=0.02)
    assert best.dtype == expected["best"].dtype


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        logits: Tensor = self.fc(x) / temperature
        return logits


@pytest.mark.parametrize("format", FORMATS)
def test_a_number_among_the_arguments_is_fixed(format: str, tmp_path: Path) -> None:
    model = trained(Scaled(), VECTORS).convert()
    path = tmp_path / f"model{SUFFIX[format]}"
    deploy.export(model, path, format, {"x": VECTORS, "temperature": 2.0})
    run = deploy.load_exported(path, int8=False)
    expected = model(VECTORS, 2.0)
    if format == "torch":
        torch.testing.assert_close(run(x=VECTORS, temperature=2.0), expected)
        return
    torch.testing.assert_close(run(VECTORS), expected, rtol=0.02, atol=0.02)
    with pytest.raises(ConfigError, match=r"got 3\.0 as temperature"):
        run(VECTORS, temperature=3.0)


class Tokens(nn.Module):
    """Takes what a tokenizer gives, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kind, self.fc = nn.Embedding(9, 8), nn.Embedding(2, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor) -> Tensor:
        output: Tensor = self.fc(self.embed(ids) + self.kind(kinds)) * mask.unsqueeze(-1)
        return output


def test_what_was_exported_by_name_is_called_by_position_as_the_model_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, kinds, mask = torch.randint(9, (6, 5)), torch.randint(2, (6, 5)), torch.ones(6, 5)
    mask[:, 3:] = 0
    batch = {"ids": ids, "kinds": kinds, "mask": mask.long()}
    model = trained(Tokens(), batch).convert()
    deploy.export(model, tmp_path / "model.onnx", "onnx", batch)
    run = deploy.load_exported(tmp_path / "model.onnx", int8=False)
    expected = model(**batch)
    assert torch.equal(model(ids, mask.long(), kinds), expected)
    torch.testing.assert_close(run(ids, mask.long(), kinds), run(**batch), rtol=0, atol=0)
    torch.testing.assert_close(run(**batch), expected, rtol=0.02, atol=0.02)


class TwoTowers(nn.Module):
    """Similarity of every image with every text."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, img: Tensor, txt: Tensor) -> Tensor:
        return cast(Tensor, self.images(img)) @ self.texts(txt).T


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_one_batch_size_have_to_keep_it(format: str, tmp_path: Path) -> None:
    inputs = VECTORS[:5], torch.randn(5, 3)
    model, path = trained(TwoTowers(), inputs).convert(), tmp_path / f"model{SUFFIX[format]}"
    deploy.export(model, path, format, inputs)
    run = deploy.load_exported(path, int8=False)
    assert run(VECTORS[:3], inputs[1][:3]).shape == (3, 3)
    message = "must hold equally many samples, as in the examples .* got 1 and 4"
    with pytest.raises(ConfigError, match=message):
        run(VECTORS[:1], inputs[1][:4])
    deploy.export(model, path, format, (VECTORS[:5], inputs[1][:4]))
    run = deploy.load_exported(path, int8=False)
    expected = model(VECTORS[:1], inputs[1][:4])
    torch.testing.assert_close(run(VECTORS[:1], inputs[1][:4]), expected, rtol=0.02, atol=0.02)


class Graph(nn.Module):
    """Features of nodes (N, 6), and edges (2, E) from one node to another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = self.fc(x)[source]
        return torch.zeros(x.shape[0], 4).index_add(0, target, messages)


EDGES = torch.tensor([[0, 1, 2, 4], [1, 2, 0, 0]])


def test_examples_that_are_no_samples_are_told_from_wrong_ones(tmp_path: Path) -> None:
    model = trained(Graph(), (VECTORS[:5], EDGES)).convert()
    message = r"but not the single sample cut from them \(IndexError.*dimension 0 of 'x' was taken"
    with pytest.raises(ConfigError, match=message):
        deploy.export(model, tmp_path / "model", "torch", (VECTORS[:5], EDGES))
    both = VECTORS[:2], EDGES % 2
    with pytest.raises(ConfigError, match=r"dimension 0 of 'x', 'edges' .*dynamic_batch=False"):
        deploy.export(model, tmp_path / "model", "torch", both)
    one = VECTORS[:1], torch.zeros(2, 3, dtype=torch.long), torch.ones(1)
    with pytest.raises(ConfigError, match="cannot be called with the example inputs"):
        deploy.export(model, tmp_path / "model", "torch", one)
    assert list(tmp_path.iterdir()) == []


class OneSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(x.view(1, 6)))


def test_one_sample_that_cannot_be_two_is_said(tmp_path: Path) -> None:
    model = trained(OneSample(), VECTORS[:1]).convert()
    with pytest.raises(ConfigError, match=r"but not their one sample twice .*dimension 0 of 'x'"):
        deploy.export(model, tmp_path / "model", "torch", VECTORS[:1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("nodes", [1, 5])
def test_sizes_may_be_fixed(nodes: int, format: str, tmp_path: Path) -> None:
    inputs = VECTORS[:nodes], EDGES % nodes
    manager = trained(Graph(), (VECTORS, EDGES))
    path = tmp_path / f"model{SUFFIX[format]}"
    result = manager.export(path, format, inputs, dynamic_batch=False)
    assert result.output_error is not None
    run = deploy.load_exported(path, int8=False)
    expected = manager.convert()(*inputs)
    torch.testing.assert_close(run(*inputs), expected, rtol=0.02, atol=0.02)
    with pytest.raises(ConfigError, match=rf"\({nodes}, 6\).* got .*\(7, 6\)"):
        run(VECTORS[:7], inputs[1])


@pytest.mark.parametrize("format", FORMATS)
def test_images_of_a_list_are_no_batch(format: str, tmp_path: Path) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = toys.ConvNet()

        def forward(self, images: list[Tensor]) -> Tensor:
            output: Tensor = self.network(torch.stack(images))
            return output

    images = list(IMAGES[:3])
    model, path = trained(Listed(), (images,)).convert(), tmp_path / f"model{SUFFIX[format]}"
    deploy.export(model, path, format, (images,), dynamic_batch=False)
    output = deploy.load_exported(path, int8=False)(images)
    torch.testing.assert_close(output, model(images), rtol=0.02, atol=0.02)


class Counting(nn.Module):
    """Adds how often it was called."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.steps += 1
        return cast(Tensor, self.fc(input)) + self.steps


def test_a_model_that_remembers_is_exported_where_files_can(tmp_path: Path) -> None:
    model = trained(Counting(), VECTORS).convert()
    with pytest.raises(NotExportableError, match=r"changes steps in its forward pass.*'torch'"):
        deploy.export(model, tmp_path / "model.onnx", "onnx", VECTORS)
    deploy.export(model, tmp_path / "model.pt2", "torch", VECTORS)
    run = deploy.load_exported(tmp_path / "model.pt2")
    for _ in range(2):
        torch.testing.assert_close(run(VECTORS), model(VECTORS))
