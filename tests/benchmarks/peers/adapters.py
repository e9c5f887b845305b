"""How each peer trains quantization-aware, and how it runs int8, as its own manual says.

Every adapter takes a float model and a batch, and imports its library itself, so that an
environment needs only the libraries of its own peers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Runner = Callable[[Tensor], Any]


# Quantization-aware training: the model to train, which is called as the float model is ----------


def torchao_pt2e(model: nn.Module, inputs: Tensor) -> nn.Module:
    """PT2E with the X86Inductor quantizer: int8 weights per channel, moving averages."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    graph = _exported(model, inputs)
    prepared = prepare_qat_pt2e(graph, _x86_quantizer(is_qat=True))
    move_exported_model_to_train(prepared)
    # An exported module refuses train(); the line above did what it does.
    prepared.train = lambda mode=True: prepared
    return prepared


def torch_ao_fx(model: nn.Module, inputs: Tensor) -> nn.Module:
    """torch.ao's FX mode with the x86 backend; deprecated."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("x86")
    return prepare_qat_fx(model.train(), mapping, (inputs,))


def modelopt(model: nn.Module, inputs: Tensor) -> nn.Module:
    """NVIDIA ModelOpt: calibrated once, scales frozen, no observers in the steps."""
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda own: own(inputs)).train()


def brevitas(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Brevitas: every layer replaced by its 8-bit one, ranges learned from statistics."""
    from brevitas.graph.quantize import layerwise_quantize

    return layerwise_quantize(model).train()


def neural_compressor(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Intel Neural Compressor 2.6."""
    from neural_compressor import QuantizationAwareTrainingConfig
    from neural_compressor.training import prepare_compression

    manager = prepare_compression(model, QuantizationAwareTrainingConfig())
    manager.callbacks.on_train_begin()
    prepared: nn.Module = getattr(manager.model, "model", manager.model)
    prepared.compression_manager = manager  # keep it alive
    return prepared.train()


# Inference in int8: what is called with a batch --------------------------------------------------


def torchao_inductor(model: nn.Module, inputs: Tensor) -> Runner:
    """PT2E, calibrated on the batch, lowered by Inductor with freezing."""
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = _exported(model, inputs)
    prepared = prepare_pt2e(graph, _x86_quantizer(is_qat=False))
    prepared(inputs)
    converted = convert_pt2e(prepared)
    inductor.freezing = True
    return torch.compile(converted)


def torch_ao_fx_int8(model: nn.Module, inputs: Tensor) -> Runner:
    """torch.ao's FX mode with the x86 backend; deprecated."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (inputs,))
    prepared(inputs)
    return convert_fx(prepared)


def openvino_nncf(model: nn.Module, inputs: Tensor) -> Runner:
    """OpenVINO's own: the float model converted, quantized by NNCF on the batch, compiled."""
    import nncf
    import openvino

    from compression_manager.integrations.openvino_runtime import shared_core

    graph = openvino.convert_model(model, example_input=inputs)
    kind = nncf.ModelType.TRANSFORMER if inputs.dim() == 3 else None
    data = nncf.Dataset([inputs.numpy()])
    quantized = nncf.quantize(graph, data, model_type=kind, subset_size=1)
    compiled = shared_core().compile_model(
        quantized,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    output = compiled.output(0)
    return lambda batch: compiled(batch.numpy())[output]


def onnxruntime_qdq(model: nn.Module, inputs: Tensor) -> Runner:
    """onnxruntime's own: the float model as ONNX, quantized statically to QDQ on the batch."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = [{"input": inputs.numpy()}]

        def get_next(self) -> Any:
            return self._left.pop() if self._left else None

    with tempfile.TemporaryDirectory() as folder:
        plain, clean, quantized = (Path(folder) / f"{name}.onnx" for name in ("a", "b", "c"))
        torch.onnx.export(
            model, (inputs,), str(plain), input_names=["input"], dynamo=True, external_data=False
        )
        quant_pre_process(str(plain), str(clean))
        quantize_static(
            str(clean), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True
        )
        content = quantized.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"input": batch.numpy()})[0]


def _exported(model: nn.Module, inputs: Tensor) -> nn.Module:
    # torchao looks for what only strict tracing notes in torch 2.11, and quantizes nothing else.
    return torch.export.export(model, (inputs,), strict=True).module()


def _x86_quantizer(*, is_qat: bool) -> Any:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=is_qat))
    return quantizer


TRAINING: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "torchao PT2E": torchao_pt2e,
    "torch.ao FX": torch_ao_fx,
    "ModelOpt": modelopt,
    "Brevitas": brevitas,
    "Neural Compressor 2.6": neural_compressor,
}
INFERENCE: dict[str, Callable[[nn.Module, Tensor], Runner]] = {
    "torchao PT2E + Inductor": torchao_inductor,
    "torch.ao FX int8": torch_ao_fx_int8,
    "OpenVINO int8 (NNCF)": openvino_nncf,
    "onnxruntime int8 QDQ": onnxruntime_qdq,
}
DISTRIBUTIONS = {
    "torchao PT2E": "torchao",
    "torch.ao FX": "torch",
    "ModelOpt": "nvidia-modelopt",
    "Brevitas": "brevitas",
    "Neural Compressor 2.6": "neural-compressor",
    "torchao PT2E + Inductor": "torchao",
    "torch.ao FX int8": "torch",
    "OpenVINO int8 (NNCF)": "openvino",
    "onnxruntime int8 QDQ": "onnxruntime",
}
"""Peer -> the distribution whose version is reported."""
