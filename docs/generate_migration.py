"""Write the table of docs/how-to/migrate-from-neural-compressor.md from the config classes.

Run `make reference`; a test compares the page with the classes.
"""

from __future__ import annotations

from pathlib import Path

from compression_plugins.compat import neural_compressor
from compression_plugins.compat.neural_compressor.fields import describe_fields

PAGE = Path(__file__).parent / "how-to" / "migrate-from-neural-compressor.md"
BEGIN = "<!-- fields: written by `make reference` -->\n"
END = "<!-- end of fields -->"

CONFIGS = (
    neural_compressor.DistillationConfig,
    neural_compressor.KnowledgeDistillationLossConfig,
    neural_compressor.IntermediateLayersKnowledgeDistillationLossConfig,
    neural_compressor.SelfKnowledgeDistillationLossConfig,
    neural_compressor.QuantizationAwareTrainingConfig,
    neural_compressor.WeightPruningConfig,
)


def page() -> str:
    """Return the page with its tables as they should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(map(_table, CONFIGS)) + END + after


def _table(config_class: type) -> str:
    rows = [f"\n### {config_class.__name__}\n", "| field | default | here |", "|---|---|---|"]
    for item in describe_fields(config_class):
        text = item.text if item.is_used else f"ignored: {item.text}"
        rows.append(f"| `{item.name}` | `{item.default}` | {text} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
