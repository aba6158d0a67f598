"""The plugin against the contract that axolotl documents for plugins, played by a stand-in."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from tests.loops import load, make_world
from tests.trainers import make_trainer

NAME = "mergeready.axolotl.MergeReadyPlugin"


class BasePlugin:
    """Hooks of the documented interface that a plugin need not have an opinion on."""

    def register(self, cfg: Any) -> None: ...

    def get_input_args(self) -> str | None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []

    def post_train(self, cfg: Any, model: Any) -> None: ...


@pytest.fixture(autouse=True)
def _axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "axolotl", types.ModuleType("axolotl"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations", types.ModuleType("axolotl.integrations"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    yield
    sys.modules.pop("mergeready.axolotl", None)


def load_by_name(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


class Config(dict):  # type: ignore[type-arg]
    """Like axolotl's: settings are attributes too, and None where they are not given."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def validate(plugin: Any, content: dict[str, Any]) -> Config:
    """Axolotl's configuration is one class that inherits from every plugin's; it is dumped without what is None."""

    class Own(BaseModel):
        model_config = ConfigDict(extra="forbid")
        output_dir: str

    merged = type("Merged", (Own, load_by_name(plugin.get_input_args())), {})
    return Config(merged.model_validate(content).model_dump(exclude_none=True))


def test_a_run(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    plugin = load_by_name(NAME)()
    assert isinstance(plugin, BasePlugin)
    config = validate(
        plugin,
        {
            "output_dir": str(tmp_path / "run"),
            "mergeready": {
                "peers": [str(world / "peer-1")],
                "probe": {
                    "merge": ["ties"],
                    "scales": [0.5],
                    "max_evaluations": 1,
                    "schedule": {"every": 2},
                },
                "stop": {"norm_budget": {"max_norm": 1e-9}},
            },
        },
    )
    plugin.register(config)
    model = load(world)
    callbacks = plugin.add_callbacks_pre_trainer(config, model)
    trainer = make_trainer(Path(config.output_dir), *callbacks, model=model)
    for callback in plugin.add_callbacks_post_trainer(config, trainer):
        trainer.add_callback(callback)
    trainer.train()
    plugin.post_train(config, model)
    [callback] = callbacks
    assert trainer.state.global_step == 1
    assert [probe.step for probe in callback.history.probes] == [1]
    assert (tmp_path / "run/mergeready/history.jsonl").exists()


def test_without_a_section_it_measures_and_probes_with_surrogates(tmp_path: Path) -> None:
    plugin = load_by_name(NAME)()
    [callback] = plugin.add_callbacks_pre_trainer(validate(plugin, {"output_dir": "x"}), None)
    assert callback.monitor.probe is not None
    assert callback.monitor.stop is None


def test_mistakes_are_found_when_the_configuration_is_read() -> None:
    plugin = load_by_name(NAME)()
    with pytest.raises(ValidationError, match="peer"):
        validate(plugin, {"output_dir": "x", "mergeready": {"peer": ["a"]}})
