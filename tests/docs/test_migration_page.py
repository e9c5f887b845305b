"""The page on migration says what the compatible config classes say."""

import importlib.util
from pathlib import Path

from compression_plugins.compat import neural_compressor
from compression_plugins.compat.neural_compressor.fields import describe_fields

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "how-to" / "migrate-from-neural-compressor.md"


def _generator():
    path = DOCS / "generate_migration.py"
    specification = importlib.util.spec_from_file_location("generate_migration", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_page_is_up_to_date():
    assert _generator().page() == PAGE.read_text(encoding="utf-8"), "run `make reference`"


def test_every_config_and_every_field_is_listed():
    text = PAGE.read_text(encoding="utf-8")
    names = [name for name in neural_compressor.__all__ if name.endswith("Config")]
    assert len(names) == 6
    for name in names:
        section = text.split(f"### {name}\n")[1].split("\n#")[0]
        for item in describe_fields(getattr(neural_compressor, name)):
            assert f"| `{item.name}` | `{item.default}` |" in section
