"""The loop of Neural Compressor 2.6's text classification, on a tiny BERT."""

import pytest
import torch

from compression_plugins.compat.neural_compressor import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    QuantizationAwareTrainingConfig,
    load,
    prepare_compression,
)

transformers = pytest.importorskip("transformers")

FLOAT = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}


def bert(layers, width):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        attn_implementation="eager",
        output_attentions=True,
    )
    return transformers.BertForSequenceClassification(config)


def test_distillation_of_attention_and_hidden_states_for_quantization(tmp_path):
    torch.manual_seed(0)
    teacher, student = bert(3, 24), bert(2, 16)
    attention = "bert.encoder.layer.{}.attention.self"
    layers = IntermediateLayersKnowledgeDistillationLossConfig(
        layer_mappings=[
            [[attention.format(0), "1"], [attention.format(1), "1"]],
            [["bert.encoder.layer.1.output"], ["bert.encoder.layer.2.output"]],
        ],
        loss_types=["KL", "MSE"],
    )
    logits = KnowledgeDistillationLossConfig(temperature=2.0, loss_types=["CE", "KL"])
    manager = prepare_compression(
        student,
        [
            DistillationConfig(teacher_model=teacher, criterion=logits),
            DistillationConfig(teacher_model=teacher, criterion=layers),
            QuantizationAwareTrainingConfig(op_name_dict={"classifier": FLOAT}),
        ],
    )
    model = manager.model
    decayed = [value for name, value in model.named_parameters() if "bias" not in name]
    others = [value for name, value in model.named_parameters() if "bias" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    batches = [
        transformers.BatchEncoding(
            {
                "input_ids": torch.randint(50, (4, 7)),
                "attention_mask": torch.ones(4, 7, dtype=torch.long),
                "labels": torch.randint(3, (4,)),
            }
        )
        for _ in range(5)
    ]
    manager.callbacks.on_train_begin()
    for epoch in range(2):
        model.train()
        manager.callbacks.on_epoch_begin(epoch)
        for step, batch in enumerate(batches):
            manager.callbacks.on_step_begin(step)
            outputs = model(**batch)
            loss = manager.callbacks.on_after_compute_loss(
                batch, outputs["logits"], outputs["loss"]
            )
            (loss / 2).backward()
            if step % 2 == 1 or step == len(batches) - 1:
                manager.callbacks.on_before_optimizer_step()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            manager.callbacks.on_step_end()
        manager.callbacks.on_epoch_end()
        assert len(optimizer.param_groups) == 3  # the projection of 16 to 24 channels
    assert manager.native.position.global_step == 6
    manager.callbacks.on_train_end()
    manager.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", bert(2, 16))
    batch = dict(batches[0])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert type(model.classifier) is torch.nn.Linear
    assert model.config.num_labels == 3
