"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from compression_manager import hookspecs

SPEC_MARK = "compression_manager_spec"  # what pluggy's marker leaves on a specification
DOCS = Path(__file__).parents[2] / "docs"


def _generator():
    specification = importlib.util.spec_from_file_location(
        "generate_reference", DOCS / "generate_reference.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["hooks.md", "options.md", "errors.md", "api.md"])
def test_page_is_up_to_date(page: str) -> None:
    expected = _generator().pages()[page]
    actual = (DOCS / "reference" / page).read_text(encoding="utf-8")
    assert actual == expected, "run `make reference`"


def test_every_public_name_has_a_docstring() -> None:
    generator = _generator()
    for module_name in generator.PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name, value in generator.public_names(module):
            if callable(value):
                assert value.__doc__, f"{module_name}.{name}"


@pytest.mark.parametrize("name", ["quant_min", "storage_dtype"])
def test_properties_are_members_whether_cached_or_not(name: str) -> None:
    assert f"#### QuantizationScheme.{name}\n\n*property*" in _generator().pages()["api.md"]


def test_every_option_has_help() -> None:
    page = _generator().options_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        assert row.rstrip(" |").count("|") >= 3, row
        assert row.split("|")[-2].strip(), row


def test_every_hook_and_every_public_name_occurs_in_a_test() -> None:
    generator = _generator()
    folder = DOCS.parent / "tests"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py"))
    words = set(re.findall(r"\w+", text))
    names = {name for name, value in vars(hookspecs).items() if hasattr(value, SPEC_MARK)}
    for module_name in generator.PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        names |= {name for name, _ in generator.public_names(module)}
    assert names - words == set()
