"""Causal and masked language models of transformers: distilled, quantized, converted."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compression_manager import prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    QATConfig,
    TokenDistillationLossConfig,
)
from toy_teachers import published

VOCABULARY, LENGTH, BATCH = 30, 8, 4


def causal(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=width, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def masked(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


# transformers' blocks return a tuple or a tensor, depending on the release.
BLOCKS = {causal: "transformer.h.*", masked: "bert.encoder.layer.*"}


def batch(kind: Any) -> dict[str, Tensor]:
    """The second sample is padded from its sixth token on."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    attention = torch.ones(BATCH, LENGTH, dtype=torch.long)
    attention[1, 5:] = 0
    labels = tokens.masked_fill(attention == 0, -100)
    if kind is masked:
        chosen = torch.rand(BATCH, LENGTH, generator=generator) < 0.4
        labels = labels.masked_fill(~chosen, -100)
    return {"input_ids": tokens, "attention_mask": attention, "labels": labels}


def counted_divergence(student: Tensor, teacher: Tensor, labels: Tensor, *, shift: bool) -> float:
    """KL(teacher || student), averaged over the positions that count."""
    logarithms = []
    for logits in (student, teacher):
        values = logits.detach().double().numpy()
        values = values - values.max(-1, keepdims=True)
        logarithms.append(values - np.log(np.exp(values).sum(-1, keepdims=True)))
    divergence = (np.exp(logarithms[1]) * (logarithms[1] - logarithms[0])).sum(-1)
    counts = labels.numpy() != -100
    if shift:
        divergence, counts = divergence[:, :-1], counts[:, 1:]
    return float(divergence[counts].mean())


@pytest.mark.parametrize("kind", [causal, masked])
@pytest.mark.parametrize("qat_first", [True, False])
def test_a_loop_that_passes_batches_needs_nothing_else(kind: Any, qat_first: bool) -> None:
    torch.manual_seed(0)
    student, teacher, inputs = kind(8), kind(16), batch(kind)
    criterion = TokenDistillationLossConfig(shift=kind is causal, chunk_size=7)
    distillation: list[Any] = [
        DistillationConfig(teacher, criterion),
        DistillationConfig(
            teacher,
            IntermediateLayersKnowledgeDistillationLossConfig([BLOCKS[kind]]),
            name="hidden",
        ),
    ]
    plugins = [QATConfig(), *distillation] if qat_first else [*distillation, QATConfig()]
    manager = prepare_compression(student, plugins)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    manager.track(optimizer=optimizer)
    manager.on_train_begin()
    losses = []
    for step in range(4):
        manager.on_step_begin(step)
        output = student(**inputs)
        loss = manager.on_after_compute_loss(inputs, output, output.loss)
        if step == 0:
            without_labels = {key: value for key, value in inputs.items() if key != "labels"}
            with torch.no_grad():
                known = teacher(**without_labels).logits
            expected = counted_divergence(
                output.logits, known, inputs["labels"], shift=kind is causal
            )
            value = published(manager)["loss/distillation/forward_kl"]
            assert value == pytest.approx(expected, rel=1e-4)
        loss.backward()
        losses.append(loss.item())
        manager.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        manager.on_step_end()
    assert losses[-1] < losses[0]
    int8 = manager.convert(copy.deepcopy(inputs))
    assert not any(module._forward_hooks for module in int8.modules())


@pytest.mark.parametrize("teacher_outputs", ["model", "ema"])
def test_hidden_states_of_the_output_are_distilled_and_stay_in_the_converted_model(
    teacher_outputs: Any,
) -> None:
    torch.manual_seed(0)
    inputs, student = batch(causal), causal(8)
    student.config.output_hidden_states = True
    with torch.no_grad():
        before = student(**inputs).hidden_states  # transformers places its hooks.
    teacher = copy.deepcopy(student) if teacher_outputs == "model" else None

    def first_block(output: Any) -> Tensor:
        return output.hidden_states[1]

    criterion = IntermediateLayersKnowledgeDistillationLossConfig(
        [[["", first_block], ["transformer", first_block]]]
    )
    distillation = DistillationConfig(teacher, criterion, teacher_outputs=teacher_outputs)
    manager = prepare_compression(student, [distillation, QATConfig()], example_inputs=inputs)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    for _ in manager.epochs(1):
        for step, _ in manager.steps(range(3)):
            output = student(**inputs)
            loss = manager.on_after_compute_loss(inputs, output, output.loss)
            value = published(manager)["loss/distillation/MSE/output"]
            assert (value == 0) == (step == 0)
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
    int8 = manager.convert(inputs)
    assert [item.shape for item in int8(**inputs).hidden_states] == [item.shape for item in before]
