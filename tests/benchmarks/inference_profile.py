"""Where the time of inference goes: products of integers and of floats, quantization, the rest.

    make bench-inference-profile

Kernels are timed by torch's profiler, or by OpenVINO's counters (PERF_COUNT), and belong to:

- products of integers: linear layers and convolutions, with all that is fused into their kernels,
  which is their bias, activation, sum and rounding;
- products of floats: such layers in float32, and the whole of attention, whose kernel multiplies
  twice and computes the softmax in between; that of the last two routes multiplies integers first;
- quantization: kernels that do nothing but round, turn integers back into real numbers, or put them
  into another order or type;
- other operators: normalization, sums, activations, means and copies, with the rounding of their
  results where it is fused into them.

Starts and rest are what remains of the time on the clock: Python, calls of kernels, allocations,
and the profiler's own work, which makes all routes somewhat slower than `inference.py` finds them.
Each route runs alone, so that its weights stay in the caches, unlike in turns. Several blocks of
batches are measured; the figures are those of a batch of the median block.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from compression_manager.deploy.reference import Reference
from compression_manager.deploy.routes import Source
from compression_manager.quantization.integer.selection import active_passes
from inference import BARS, BASELINE, ROUTES, Route, Runner, Subject, parse_with_routes, subject_of
from measuring import machine
from measuring.command import model_parser
from measuring.kernel_parts import INTEGERS, KERNEL_PARTS, marked, part_of_event, part_of_node
from measuring.models import WORKLOADS
from measuring.report import row, write_json

REST = "starts and rest"
PARTS = (*KERNEL_PARTS, REST)
WIDTHS = (26, 8, 20, 18, 12, 15, 15)
TORCH = (BASELINE, "int8-eager", "int8-inductor", "int8-aot-inductor")
OPENVINO = {"int8-openvino": False, "int8-symmetric": False, "int8-bfloat16": True}
"""Routes that OpenVINO runs, and whether with bfloat16."""
MODELS = ("encoder", "resnet")
WARM_UP = 3
"""Calls before those that are timed."""

Parts = dict[str, float]
"""Milliseconds of a batch: all, and each of `PARTS`."""
Sample = Callable[[int], Parts]
"""What measures a block of so many batches."""


def sampler(route: Route, subject: Subject) -> Sample:
    """Return what measures a route; whatever it raises is why it cannot be measured."""
    if route.name in OPENVINO:
        return _openvino_sampler(subject.model_of(route), subject.inputs, OPENVINO[route.name])
    # Without it generated kernels are no events.
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        run = route.runner(subject)
        _call(run, subject.inputs, WARM_UP)
    return lambda batches: torch_parts(run, subject.inputs, batches)


def torch_parts(run: Runner, inputs: Tensor, batches: int) -> Parts:
    """Return the parts of a batch under torch's profiler."""
    _call(run, inputs, 1)
    with marked(active_passes()), profile(activities=[ProfilerActivity.CPU]) as recorded:
        passed = _call(run, inputs, batches)
    times = [
        (part, event.self_cpu_time_total / 1e3)
        for event in recorded.events()
        if (part := part_of_event(event)) is not None
    ]
    return _parts(passed, times, batches)


def _openvino_sampler(model: nn.Module, inputs: Tensor, bfloat16: bool) -> Sample:
    from compression_manager.integrations import openvino_runtime  # an extra

    source = Source(model, Reference.of(model, inputs))

    def sample(batches: int) -> Parts:
        network, compiled = openvino_runtime.compile_openvino(
            source.onnx, int8=True, bfloat16=bfloat16, PERF_COUNT=True
        )
        run = source.structured(openvino_runtime.called_as_network(network, compiled))
        return openvino_parts(network, compiled, run, inputs, batches)

    return sample


def openvino_parts(network: Any, compiled: Any, run: Runner, inputs: Tensor, batches: int) -> Parts:
    """Return the parts of a batch by the counters of a network that was not called before.

    Args:
        network: what was compiled.
        compiled: of it, with counters.
        run: calls it.
        inputs: of every call.
        batches: how many calls are measured.
    """
    multiplying = _multiplying(network, compiled)
    request = compiled.create_infer_request()  # counters are those of all requests
    _call(run, inputs, WARM_UP)
    before = request.profiling_info
    passed = _call(run, inputs, batches)
    times = []
    for first, last in zip(before, request.profiling_info, strict=True):
        part = part_of_node(
            last.node_type, last.exec_type, multiplies=last.node_name in multiplying
        )
        # Each counter is the mean over all calls up to now.
        spent = _milliseconds(last) * (WARM_UP + batches) - _milliseconds(first) * WARM_UP
        times.append((part, spent))
    return _parts(passed, times, batches)


def _multiplying(network: Any, compiled: Any) -> set[str]:
    """Return the nodes into which OpenVINO put a product, as it puts attention into one."""
    products = {
        node.get_friendly_name()
        for node in network.get_ops()
        if node.get_type_name() in ("MatMul", "ScaledDotProductAttention")
    }
    found = set()
    for node in compiled.get_runtime_model().get_ops():
        notes = node.get_rt_info()
        names = notes["originalLayersNames"].astype(str) if "originalLayersNames" in notes else ""
        if not products.isdisjoint(names.split(",")):
            found.add(node.get_friendly_name())
    return found


def _milliseconds(counter: Any) -> float:
    return 1e3 * float(counter.real_time.total_seconds())


def _call(run: Runner, inputs: Tensor, times: int) -> float:
    """Return the milliseconds of so many calls."""
    began = time.perf_counter()
    for _ in range(times):
        run(inputs)
    return 1e3 * (time.perf_counter() - began)


def _parts(passed: float, times: Sequence[tuple[str, float]], batches: int) -> Parts:
    """Return the parts of one of `batches` that together took `passed`."""
    parts = dict.fromkeys(KERNEL_PARTS, 0.0)
    for part, spent in times:
        parts[part] += spent / batches
    everything = passed / batches
    return {"all": everything, **parts, REST: everything - sum(parts.values())}


def median(samples: Sequence[Parts]) -> Parts:
    """Return the sample whose time is in the middle, so that its parts still make the whole."""
    return sorted(samples, key=lambda parts: parts["all"])[(len(samples) - 1) // 2]


def measure(
    subject: Subject, routes: Sequence[Route], blocks: int, batches: int
) -> list[dict[str, Any]]:
    """Return an entry for each route: its parts, or why it cannot be measured."""
    entries = []
    for route in routes:
        entry: dict[str, Any] = {"route": route.name, "title": route.title, "skipped": None}
        try:
            with torch.no_grad():
                sample = sampler(route, subject)
                entry["parts"] = median([sample(batches) for _ in range(blocks)])
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            entry["skipped"] = f"{type(error).__name__}: {lines[0][:200]}"
        entries.append(entry)
    return entries


def operations_of_layers(model: nn.Module, inputs: Tensor) -> int:
    """Return the multiplications and additions of all linear layers and convolutions."""
    counts: list[int] = []

    def count(layer: nn.Module, args: Any, output: Tensor) -> None:
        counts.append(2 * output.numel() * layer.weight[0].numel())

    layers = [item for item in model.modules() if isinstance(item, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def finding(model: str, entries: Sequence[dict[str, Any]], operations: int) -> str:
    """Return what bounds the fastest route on integers.

    Args:
        model: name of the workload.
        entries: what `measure` returned of it.
        operations: what `operations_of_layers` returned.
    """
    parts = {entry["title"]: entry["parts"] for entry in entries if entry["skipped"] is None}
    baseline = parts[ROUTES[0].title]["all"]
    usable = {title: own for title, own in parts.items() if own[INTEGERS] > 0}
    if not usable:
        return f"{model}: no route multiplies integers."
    title, own = min(usable.items(), key=lambda item: item[1]["all"])
    everything, products = own["all"], own[INTEGERS]
    text = (
        f"{model}: the fastest is {title}, with {baseline / everything:.1f} times float32's speed. "
        f"Products of integers take {products / everything:.0%} of its time, "
        f"{operations / products / 1e6:.0f} * 10^9 operations a second. With nothing but these it "
        f"would have {baseline / products:.1f} times float32's speed, with all but these "
        f"{baseline / (everything - products):.1f} times."
    )
    bar = BARS.get(model)
    return text if bar is None else f"{text} The bar of {bar:.0f} is {baseline / bar:.1f} ms."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return what was measured."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    print(machine.in_words(described), flush=True)
    document: dict[str, Any] = {
        "benchmark": "inference_profile",
        "machine": described,
        "results": [],
        "findings": {},
    }
    for name in options.models:
        workload = WORKLOADS[name](options.shrink)
        print(f"profiling {name} ...", file=sys.stderr, flush=True)
        subject = subject_of(workload)
        entries = measure(subject, options.routes, options.blocks, options.batches)
        print(f"\n{name}, milliseconds of a batch\n{row(['', 'all', *PARTS], WIDTHS)}", flush=True)
        for entry in entries:
            print(_line(entry), flush=True)
        operations = operations_of_layers(subject.float_model, subject.inputs)
        document["findings"][name] = finding(name, entries, operations)
        print(document["findings"][name], flush=True)
        document["results"] += [{"model": name, **entry} for entry in entries]
    write_json(options.json, document)
    return document


def _line(entry: dict[str, Any]) -> str:
    if entry["skipped"] is not None:
        return f"{entry['title']:<{WIDTHS[0]}}  skipped: {entry['skipped']}"
    return row([entry["title"], *(f"{value:.2f}" for value in entry["parts"].values())], WIDTHS)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, "inference_profile")
    parser.set_defaults(models=list(MODELS))
    parser.add_argument("--blocks", type=int, default=7, help="of which the median is shown")
    parser.add_argument("--batches", type=int, default=8, help="in a block")
    profiled = [route for route in ROUTES if route.name in (*TORCH, *OPENVINO)]
    return parse_with_routes(parser, arguments, profiled)


if __name__ == "__main__":
    main()
