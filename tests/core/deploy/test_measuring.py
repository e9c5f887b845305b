"""`fastest`: wrong routes are never chosen, missing ones are listed, and the table says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy
from compression_manager.deploy import routes
from compression_manager.deploy.reference import Reference
from compression_manager.errors import ConfigError, NotExportableError
from quantization_reference import prepared, trained

VECTORS = toys.vectors().tensors[0]


class Outputs(nn.Module):
    """A mapping of tensors, and something that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.fc(x)
        return {"logits": logits, "nothing": None, "best": logits.argmax(1)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(toys.mlp(), VECTORS).convert()


@dataclass
class FakeRoute(routes.Route):
    """Runs the model itself, changed by `change`, after a pause."""

    name: str
    pause: float = 0.0
    change: Callable[[Tensor, bool], Tensor] = lambda output, int8: output
    packages: tuple[str, ...] = ()
    extra: str | None = None
    int8_settings: tuple[bool, ...] = (True,)

    def build(self, source: routes.Source, *, int8: bool) -> tuple[routes.Runner, str]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            time.sleep(self.pause)
            return self.change(source.model(*args, **kwargs), int8)

        return run, "8-bit" if int8 else "float32"


def fail(output: Tensor, int8: bool) -> Tensor:
    raise ValueError("this machine has no such kernel")


def with_routes(monkeypatch: pytest.MonkeyPatch, *items: routes.Route) -> None:
    eager = routes.ROUTES["eager"]
    monkeypatch.setattr(routes, "ROUTES", {item.name: item for item in (eager, *items)})


def test_the_fastest_of_those_that_agree_is_chosen(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_routes(
        monkeypatch,
        FakeRoute("slow", 0.02),
        FakeRoute("wrong", change=lambda output, int8: output * 1.1),
        FakeRoute("broken", change=fail),
        FakeRoute("nothing", change=lambda output, int8: output * float("nan")),
        FakeRoute("other shape", change=lambda output, int8: output[:, :2]),
    )
    result = deploy.fastest(model, VECTORS, rounds=3)
    found = {item.route: item for item in result.results}
    assert isinstance(result, deploy.Fastest)
    assert all(isinstance(item, deploy.RouteResult) for item in result.results)
    assert result.best is found["eager"]
    assert found["slow"].milliseconds is not None
    assert found["slow"].milliseconds >= 20
    assert found["slow"].ratio == pytest.approx(
        found["slow"].milliseconds / (found["eager"].milliseconds or 0)
    )
    assert found["eager"].ratio == 1
    assert found["wrong"].output_error == pytest.approx(0.1, rel=0.01)
    assert "wrong outputs: relative error 0.1, allowed 0.02" in str(found["wrong"].left_out)
    assert "this machine has no such kernel" in str(found["broken"].left_out)
    assert "returns float32 (32, 2) instead of" in str(found["other shape"].left_out)
    assert found["broken"].kernels == "8-bit"
    for name in ("wrong", "broken", "nothing", "other shape"):
        assert found[name].milliseconds is None
    assert torch.equal(result(VECTORS), model(VECTORS))


def test_a_faster_route_is_called_in_place_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.pause = 0.0

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(self.pause)
            return self.fc(x)

    class Quick(FakeRoute):
        def build(self, source: routes.Source, *, int8: bool) -> tuple[routes.Runner, str]:
            fc = source.model.fc

            def run(x: Tensor) -> Tensor:
                calls.append(len(x))
                return fc(x)

            return run, "quick"

    converted = trained(Slow(), VECTORS).convert()
    converted.pause = 0.02
    with_routes(monkeypatch, Quick("quick"))
    result = deploy.fastest(converted, VECTORS, rounds=2)
    assert (result.best.route, result.best.kernels) == ("quick", "quick")
    assert result.best.ratio is not None
    assert result.best.ratio < 0.5
    result(VECTORS[:1])
    assert calls[-1] == 1


def test_float_kernels_follow_8_bit_ones_that_are_wrong(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    saturating = FakeRoute(
        "runtime",
        change=lambda output, int8: output.clamp(max=0) if int8 else output,
        int8_settings=(True, False),
    )
    right = FakeRoute("right", int8_settings=(True, False))
    with_routes(monkeypatch, saturating, right)
    result = deploy.fastest(model, VECTORS, rounds=1)
    rows = [(row.route, row.kernels, row.left_out is None) for row in result.results]
    assert rows == [
        ("eager", "the model's own", True),
        ("runtime", "8-bit", False),
        ("runtime", "float32", True),
        ("right", "8-bit", True),
    ]


def test_missing_packages_are_listed_with_their_extra(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_routes(monkeypatch, FakeRoute("absent", packages=("no_such_package",), extra="absent"))
    result = deploy.fastest(model, VECTORS, rounds=1)
    expected = "no_such_package missing: pip install 'compression-manager[absent]'"
    assert result.results[1].left_out == expected
    assert expected in str(result)


def test_the_table_has_a_line_for_each_route(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_routes(
        monkeypatch,
        FakeRoute("slow", 0.01),
        FakeRoute("wrong", change=lambda output, int8: -output),
    )
    result = deploy.fastest(model, VECTORS[:3], rounds=2)
    title, header, eager, slow, wrong = str(result).split("\n")
    threads = torch.get_num_threads()
    assert title == f"batch size 3, {threads} thread{'s' if threads > 1 else ''}"
    assert header.split() == [
        "route",
        "kernels",
        "ms",
        "spread",
        "ratio",
        "error",
        *header.split()[-3:],
    ]
    assert eager.endswith("fastest")
    assert f"{result.results[1].milliseconds:.3f}" in slow
    assert wrong.split()[2:6] == ["-", "-", "-", "2.0e+00"]
    assert slow.split()[5] == "0.0e+00"
    assert "relative error 2" in wrong


def test_outputs_keep_the_models_structure() -> None:
    converted = trained(Outputs(), VECTORS).convert()
    expected = converted(VECTORS)
    source = routes.Source(converted, Reference.of(converted, VECTORS))
    run = source.structured(lambda x: (expected["logits"], expected["best"]))
    assert run(VECTORS) == expected


class Tempered(nn.Module):
    """Logits, and how many there are."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self.fc, self.counts = nn.Linear(6, 4), counts

    def forward(self, x: Tensor, temperature: float = 1.0) -> dict[str, Any]:
        count = len(x) if self.counts else 4
        return {"logits": self.fc(x) / temperature, "count": count, "kind": "logits"}


def test_a_runtime_s_outputs_keep_what_stands_beside_tensors() -> None:
    converted = trained(Tempered(counts=False), VECTORS).convert()
    source = routes.Source(converted, Reference.of(converted, VECTORS))
    run, _ = routes.ROUTES["onnxruntime"].build(source, int8=False)
    output = run(VECTORS)
    assert (list(output), output["count"], output["kind"]) == (
        ["logits", "count", "kind"],
        4,
        "logits",
    )
    torch.testing.assert_close(output["logits"], converted(VECTORS)["logits"], rtol=0.02, atol=0.02)


class OneBatchSize(Tempered):
    def forward(self, x: Tensor, temperature: float = 1.0) -> dict[str, Any]:
        return super().forward(x.view(len(VECTORS), 6), temperature)


def test_inputs_that_are_no_samples_are_not_blamed_on_whoever_gave_them() -> None:
    converted = trained(OneBatchSize(counts=False), VECTORS).convert()
    source = routes.Source(converted, Reference.of(converted, VECTORS))
    with pytest.raises(ConfigError, match="does not take 1 made of the inputs: RuntimeError"):
        source.structured(lambda x: x)


def test_arguments_that_are_no_tensors_are_those_of_the_examples() -> None:
    converted = trained(Tempered(counts=False), VECTORS).convert()
    inputs = {"x": VECTORS, "temperature": 2.0}
    expected = converted(**inputs)
    source = routes.Source(converted, Reference.of(converted, inputs))
    run = source.structured(lambda x=None, temperature=None: (expected["logits"],))
    assert run(**inputs) == expected
    assert run(VECTORS, 2.0) == expected
    for arguments, shown in ((VECTORS,), "none"), ((VECTORS, 3.0), r"temperature=3\.0"):
        with pytest.raises(ConfigError, match=rf"measured with.*temperature=2\.0; got {shown}"):
            run(*arguments)


def test_labels_among_the_examples_are_left_out() -> None:
    converted = trained(Tempered(counts=False), VECTORS).convert()
    inputs = {"x": VECTORS, "labels": torch.zeros(len(VECTORS), dtype=torch.long)}
    assert deploy.fastest(converted, inputs, routes=["eager"], rounds=1).batch_size == len(VECTORS)


def test_outputs_that_count_the_samples_are_not_those_of_the_examples() -> None:
    converted = trained(Tempered(counts=True), VECTORS).convert()
    source = routes.Source(converted, Reference.of(converted, VECTORS))
    with pytest.raises(ConfigError, match="depends on the number of samples"):
        source.structured(lambda x: (x,))


def test_only_the_routes_that_are_named_are_measured(model: nn.Module) -> None:
    result = deploy.fastest(model, VECTORS, routes=["onnxruntime"], rounds=1)
    assert {row.route for row in result.results} == {"eager", "onnxruntime"}
    measured = [row for row in result.results if row.milliseconds is not None]
    assert "onnxruntime" in {row.route for row in measured}
    assert all(row.output_error is not None and row.output_error <= 0.02 for row in measured)
    torch.testing.assert_close(result(VECTORS[:2]), model(VECTORS[:2]), rtol=0.02, atol=0.02)


def convolutions(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    return trained(net, images).convert()


def test_images_are_handed_over_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(8, 3, 6, 6)
    converted = convolutions(images)
    source = routes.Source(converted, Reference.of(converted, images))
    run, _ = routes.ROUTES["channels_last"].build(source, int8=True)
    seen: list[Tensor] = []
    converted[2].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    assert torch.equal(run(images), converted(images))
    assert [item.is_contiguous(memory_format=torch.channels_last) for item in seen] == [True, False]
    assert images.is_contiguous()
    with_routes(monkeypatch, routes.ROUTES["channels_last"])
    _, found = deploy.fastest(converted, images, rounds=1).results
    assert (found.route, found.output_error) == ("channels_last", 0)


def test_images_that_are_channels_last_have_no_such_route() -> None:
    images = torch.randn(8, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    found = deploy.fastest(convolutions(images), images, routes=["channels_last"], rounds=1)
    assert "makes no difference to these inputs" in str(found.results[1].left_out)


def test_a_route_that_makes_no_difference_is_measured_only_if_named(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_routes(monkeypatch, routes.ROUTES["channels_last"])
    assert [item.route for item in deploy.fastest(model, VECTORS, rounds=1).results] == ["eager"]
    named = deploy.fastest(model, VECTORS, routes=["channels_last"], rounds=1)
    assert [item.route for item in named.results] == ["eager", "channels_last"]


def test_a_model_without_one_graph_leaves_the_model_itself(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(*args: Any, **kwargs: Any) -> Any:
        raise NotExportableError("torch.export cannot trace the model")

    monkeypatch.setattr(routes, "trace", untraceable)
    result = deploy.fastest(model, VECTORS, routes=["onnxruntime", "openvino"], rounds=1)
    assert result.best.route == "eager"
    reasons = [row.left_out for row in result.results[1:]]
    assert reasons == ["torch.export cannot trace the model"] * 2


def test_what_is_no_route_or_no_converted_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no route 'openvin'; did you mean 'openvino'"):
        deploy.fastest(model, VECTORS, routes=["openvin"])
    with pytest.raises(ConfigError, match="routes is a list of names"):
        deploy.fastest(model, VECTORS, routes="openvino")
    with pytest.raises(ConfigError, match="rounds must be an integer of at least 1, got 0"):
        deploy.fastest(model, VECTORS, rounds=0)
    with pytest.raises(ConfigError, match="fastest takes a converted model; layer '0'"):
        deploy.fastest(prepared(toys.mlp(), [VECTORS]).model, VECTORS)
    with pytest.raises(ConfigError, match="cannot be called with the example inputs"):
        deploy.fastest(model, VECTORS[:, :3])
