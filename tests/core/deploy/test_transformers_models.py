"""GPT-2, BERT and ViT of transformers, tiny, from a config: trained, converted, saved and loaded.

transformers is imported inside of the tests, because that alone takes seconds.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager import (
    CompressionManager,
    NotExportableError,
    deploy,
    prepare_compression,
)
from compression_manager.quantization.layers import QuantizedConv1D, QuantizedLayer
from compression_plugins import QATConfig

VOCABULARY, LENGTH = 40, 8


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def sentences() -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tokens(), "attention_mask": mask, "labels": torch.tensor([0, 1])}


def images() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 3) -> CompressionManager:
    manager = prepare_compression(model, [QATConfig()], example_inputs=inputs)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.track(optimizer=optimizer)
    for _ in manager.epochs(1):
        for _, batch in manager.steps([inputs] * steps):
            output = model(**batch)
            loss = manager.on_after_compute_loss(batch, output, output.loss)
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
    return manager


def layers_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose class, or float class, has this name."""
    found = []
    for module in model.modules():
        kind: Any = module.float_class if isinstance(module, QuantizedLayer) else type(module)
        found += [module] if kind.__name__ == name else []
    return found


def serve(manager: CompressionManager, fresh: nn.Module, inputs: Any, folder: Path) -> nn.Module:
    """Convert with parity, save, and load with equal integers and outputs."""
    converted = manager.convert(example_inputs=inputs)
    manager.save_converted(folder)
    loaded = deploy.load(folder, fresh)
    saved, own = converted.state_dict(), loaded.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in saved.items())
    with torch.no_grad():
        trained = manager.model.eval()(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, converted(**inputs).logits)
        difference = (trained - loaded(**inputs).logits).square().mean().sqrt()
    assert difference <= 2e-2 * trained.square().mean().sqrt()
    parity = manager.report(inputs).parity
    assert parity is not None
    assert max(parity.layer_errors.values()) <= 1e-5
    return loaded


def test_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2()
    convolutions = layers_of(model, "Conv1D")
    assert len(convolutions) == 8  # four in each of two blocks
    before = [layer.weight.detach().clone() for layer in convolutions]
    manager = train(model, text())
    assert all(isinstance(layer, QuantizedConv1D) for layer in convolutions)
    for layer, weight in zip(convolutions, before, strict=True):
        assert not torch.equal(layer.weight, weight)
    loaded = serve(manager, gpt2(), text(), tmp_path / "gpt2")
    for layer in convolutions:
        name = next(key for key, module in model.named_modules() if module is layer)
        converted = loaded.get_submodule(name)
        assert converted.integer_weight().dtype == torch.int8
        assert converted.integer_weight().shape == layer.weight.t().shape
        assert converted.weight.shape == layer.weight.shape
    # The output layer's weight is the embedding's.
    assert loaded.lm_head.integer_weight() is loaded.transformer.wte.integer_weight()


def test_bert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    manager = train(model, sentences())
    for name, count in {"Linear": 14, "Embedding": 3}.items():
        found = layers_of(model, name)
        assert len(found) == count
        assert all(isinstance(layer, QuantizedLayer) for layer in found)
    serve(manager, bert(), sentences(), tmp_path / "bert")
    report = manager.report(sentences())
    floating = {item.name: item.detail for item in report.layers if not item.quantized}
    assert len(floating) == len(layers_of(model, "LayerNorm")) == 5
    assert set(floating.values()) == {"LayerNorm has no quantized form"}


def test_vit(tmp_path: Path) -> None:
    """It brings its images to the dtype of the first convolution's weight."""
    torch.manual_seed(0)
    manager = train(vit(), images())
    loaded = serve(manager, vit(), images(), tmp_path / "vit")
    pixels = {"pixel_values": images()["pixel_values"]}
    for format, name in {"onnx": "model.onnx", "torch": "model.pt2"}.items():
        result = deploy.export(loaded, tmp_path / name, format, pixels)
        assert result.output_error < 1e-2
    program = deploy.load_exported(tmp_path / "model.pt2")
    with torch.no_grad():
        expected = loaded(**pixels).logits
    torch.testing.assert_close(program(**pixels).logits, expected, rtol=1e-2, atol=1e-3)
    output = deploy.load_exported(tmp_path / "model.onnx", int8=False)(**pixels)
    assert type(output) is dict
    assert output.keys() == {"logits"}
    torch.testing.assert_close(output["logits"], expected, rtol=1e-2, atol=1e-3)


def test_closing_gives_gpt2_its_float_classes_back() -> None:
    torch.manual_seed(0)
    model = gpt2()
    kinds = [type(module) for module in model.modules()]
    train(model, text(), steps=1).close()
    assert [type(module) for module in model.modules()] == kinds


def test_a_prepared_gpt2_is_pickled() -> None:
    """Its layers' class is made when the first one is found."""
    torch.manual_seed(0)
    model = gpt2()
    train(model, text(), steps=2)
    assert layers_of(model, "Conv1D")
    again = pickle.loads(pickle.dumps(model.eval()))
    assert [type(module) for module in again.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_cache_between_calls_is_named_by_its_option(tmp_path: Path) -> None:
    manager = train(gpt2(), text())
    converted = manager.convert()
    manager.close()
    with pytest.raises(NotExportableError, match=r"set model\.config\.use_cache = False"):
        deploy.export(converted, tmp_path / "model.pt2", "torch", {"input_ids": tokens()})
    converted.config.use_cache = False
    deploy.export(converted, tmp_path / "model.pt2", "torch", {"input_ids": tokens()})
