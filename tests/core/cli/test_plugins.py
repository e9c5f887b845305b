"""`compression-manager plugins`: everything that is installed, broken or not."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compression_manager import Plugin, PluginConfig, option
from compression_manager.cli import main
from compression_manager.plugin_host.discovery import installed_plugins, load_plugin_class


@dataclass(frozen=True)
class Part:
    """A part."""

    width: int = field(default=3, metadata=option("How wide it is."))


@dataclass(frozen=True)
class WholeConfig(PluginConfig):
    """A whole
    of parts.

    More about it.
    """

    plugin: ClassVar[str] = "whole"
    part: Part = field(default_factory=Part, metadata=option("The part."))
    helper: Any = field(default=None, metadata=option("It helps.", runtime=True))


class WholePlugin(Plugin[WholeConfig]):
    config_class = WholeConfig


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_every_option_of_every_installed_plugin_is_listed(capsys: Any) -> None:
    assert main(["plugins", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)["plugins"]}
    assert list(listed) == sorted(installed_plugins())
    assert {"distillation", "qat", "ptq"} <= set(listed)
    for name, plugin in listed.items():
        fields = dataclasses.fields(load_plugin_class(name).config_class)
        assert [item["name"] for item in plugin["options"]] == [item.name for item in fields]
        assert [item["help"] for item in plugin["options"]] == [
            item.metadata["help"] for item in fields
        ]
        assert plugin["distributions"][0]["name"] == "compression-manager"
        assert plugin["error"] is None


def test_text_names_type_default_and_help(install: Any, module: Any, capsys: Any) -> None:
    module.Plugin = WholePlugin
    install(("whole", "third_party_module:Plugin", "dist-whole"))
    assert main(["plugins"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[:2] == ["whole (dist-whole 1.2)", "  A whole of parts."]
    lines = _lines(output)
    assert lines[lines.index("part: Part (default Part())") + 1] == "The part."
    assert lines[lines.index("helper: Any (default None, a live object)") + 1] == "It helps."
    assert "How wide it is." not in lines


def test_one_plugin_has_the_options_of_its_values(install: Any, module: Any, capsys: Any) -> None:
    module.Plugin = WholePlugin
    install(("whole", "third_party_module:Plugin", "dist-whole"), ("other", "a:b", "dist-other"))
    assert main(["plugins", "whole"]) == 0
    lines = _lines(capsys.readouterr().out)
    assert lines[lines.index("width: int (default 3)") + 1] == "How wide it is."
    assert lines[lines.index("Part") + 1] == "A part."


def test_values_chosen_by_name_show_the_name(capsys: Any) -> None:
    assert main(["plugins", "distillation", "--json"]) == 0
    (plugin,) = json.loads(capsys.readouterr().out)["plugins"]
    values = {item["type"]: item for item in plugin["values"]}
    assert values["knowledge_distillation"]["class"] == "KnowledgeDistillationLossConfig"
    temperature = next(
        item
        for item in values["knowledge_distillation"]["options"]
        if item["name"] == "temperature"
    )
    assert temperature["help"]


def test_broken_plugin_is_listed_beside_the_others(install: Any, module: Any, capsys: Any) -> None:
    module.Plugin = WholePlugin
    install(
        ("broken", "no_such_module_at_all:Plugin", "dist-broken"),
        ("whole", "third_party_module:Plugin", "dist-whole"),
    )
    assert main(["plugins"]) == 1
    printed = capsys.readouterr()
    assert "broken (dist-broken 1.2)\n  error: " in printed.out
    assert "no_such_module_at_all" in printed.out
    assert "whole (dist-whole 1.2)" in printed.out
    assert "plugin 'broken' cannot be used" in printed.err
    assert main(["plugins", "--json"]) == 1
    broken, whole = json.loads(capsys.readouterr().out)["plugins"]
    assert broken["distributions"] == [{"name": "dist-broken", "version": "1.2"}]
    assert "no_such_module_at_all" in broken["error"]
    assert whole["error"] is None
    assert main(["plugins", "whole"]) == 0


def test_plugin_for_a_newer_hook_api_is_listed_and_not_imported(
    install: Any, module: Any, capsys: Any
) -> None:
    module.Plugin = WholePlugin
    install(
        ("later", "no_such_module_at_all:Plugin", "dist-new", "compression_manager.plugins.v2"),
        ("whole", "third_party_module:Plugin", "dist-whole"),
    )
    assert main(["plugins"]) == 1
    printed = capsys.readouterr()
    assert "later (dist-new 1.2)\n  error: " in printed.out
    assert "needs hook API 2" in printed.err
    assert "cannot be imported" not in printed.err
    assert "whole (dist-whole 1.2)" in printed.out
    assert main(["plugins", "whole"]) == 0


def test_default_that_raises_breaks_only_its_plugin(install: Any, module: Any, capsys: Any) -> None:
    def fail() -> int:
        raise RuntimeError("no default today")

    @dataclass(frozen=True)
    class FailingConfig(PluginConfig):
        plugin: ClassVar[str] = "failing"
        size: int = field(default_factory=fail, metadata=option("A size."))

    module.Failing = type("Failing", (Plugin,), {"config_class": FailingConfig})
    module.Whole = WholePlugin
    install(
        ("failing", "third_party_module:Failing", "dist-a"),
        ("whole", "third_party_module:Whole", "dist-b"),
    )
    assert main(["plugins"]) == 1
    printed = capsys.readouterr()
    assert "no default today" in printed.err
    assert "whole (dist-b 1.2)" in printed.out


def test_competing_distributions_are_both_named(install: Any, capsys: Any) -> None:
    install(("same", "a:b", "dist-a"), ("same", "c:d", "dist-b"))
    assert main(["plugins"]) == 1
    assert "same (dist-a 1.2, dist-b 1.2)" in capsys.readouterr().out


def test_unknown_name_gets_the_nearest(capsys: Any) -> None:
    assert main(["plugins", "distilation"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "did you mean 'distillation'" in printed.err


def test_what_a_plugin_prints_at_import_stays_out_of_the_output(
    install: Any, module: Any, capsys: Any, monkeypatch: Any
) -> None:
    class Loud(type(module)):
        @property
        def Plugin(self) -> type:
            print("hello")
            return WholePlugin

    module.__class__ = Loud
    install(("whole", "third_party_module:Plugin", "dist-whole"))
    assert main(["plugins", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["plugins"][0]["name"] == "whole"
    assert "hello" in printed.err
