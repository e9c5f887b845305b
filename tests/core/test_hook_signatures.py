"""Hook signatures are frozen: third parties' plugins are written against them.

`hook_signatures.yaml` holds what this version of the hook API promised.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import compression_manager
import toys
from compression_manager import deploy, hookspecs, prepare_compression, quantization
from probes import probe

FILE = Path(__file__).with_name("hook_signatures.yaml")
POLICY = (
    "Within one version of the hook API nothing is removed, renamed or given another type. The "
    "deprecation policy (docs/how-to/write-a-plugin.md) asks for a DeprecationWarning through two "
    "minor releases first, and then for a higher HOOK_API_VERSION."
)
Signatures = dict[str, dict[str, str]]


def _present() -> dict[str, Any]:
    """What the specification says now, in the shape of the file."""
    first = "the first result of "
    hooks = {
        name: {
            **{key: str(item.annotation) for key, item in signature.parameters.items()},
            "return": first * function.compression_manager_spec["firstresult"]
            + str(signature.return_annotation),
        }
        for name, function in vars(hookspecs).items()
        if hasattr(function, "compression_manager_spec")
        for signature in [inspect.signature(function)]
    }
    return {"version": hookspecs.HOOK_API_VERSION, "hooks": hooks}


def _frozen() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return document


def _broken(frozen: Signatures, present: Signatures) -> list[str]:
    """Return what an existing plugin could trip over."""
    broken = [f"{hook} is gone" for hook in frozen if hook not in present]
    for hook in frozen.keys() & present.keys():
        for name, kind in frozen[hook].items():
            if name not in present[hook]:
                broken.append(f"{hook}({name}) is gone")
            elif present[hook][name] != kind:
                broken.append(f"{hook}({name}) was {kind}, is {present[hook][name]}")
    return sorted(broken)


def test_nothing_that_was_promised_is_gone() -> None:
    frozen, present = _frozen(), _present()
    if frozen["version"] == present["version"]:
        assert _broken(frozen["hooks"], present["hooks"]) == [], POLICY


def test_file_lists_every_hook_and_parameter() -> None:
    assert _frozen() == _present(), (
        f"New hooks and parameters are compatible; add them to {FILE.name}. {POLICY}"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda hooks: hooks.pop("on_step_end"), ["on_step_end is gone"]),
        (lambda hooks: hooks["on_step_begin"].pop("step"), ["on_step_begin(step) is gone"]),
        (
            lambda hooks: hooks["on_step_begin"].update(step="float"),
            ["on_step_begin(step) was int, is float"],
        ),
        (
            lambda hooks: hooks["on_step_end"].update({"return": "the first result of None"}),
            ["on_step_end(return) was None, is the first result of None"],
        ),
        (lambda hooks: hooks["on_step_begin"].update(batch="int"), []),
        (lambda hooks: hooks.update(on_new={"return": "None"}), []),
    ],
)
def test_what_counts_as_broken(change: Any, expected: list[str]) -> None:
    hooks = copy.deepcopy(_frozen()["hooks"])
    change(hooks)
    assert _broken(_frozen()["hooks"], hooks) == sorted(expected)


def test_every_type_in_a_signature_is_public() -> None:
    """Else authors could not annotate their hooks without importing from our internals."""
    text = " ".join(kind for hook in _present()["hooks"].values() for kind in hook.values())
    foreign = {"Any", "BaseException", "Callable", "Mapping", "None", "Sequence"}
    torch_names = {"Module", "Tensor"}
    public = {*compression_manager.__all__, *quantization.__all__, *deploy.__all__}
    assert set(re.findall(r"\b[A-Z]\w+", text)) - foreign - torch_names - public == set()


def test_hooks_can_be_deprecated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The means that the policy names: pluggy warns whoever implements such a hook."""
    marks = hookspecs.on_step_end.compression_manager_spec
    monkeypatch.setitem(marks, "warn_on_impl", DeprecationWarning("on_step_end goes with v2"))
    with pytest.warns(DeprecationWarning, match="on_step_end goes with v2"):
        prepare_compression(toys.mlp(), [probe(on_step_end=lambda self: None)])
    with warnings.catch_warnings(action="error"):
        prepare_compression(toys.mlp(), [probe(on_step_begin=lambda self: None)])
