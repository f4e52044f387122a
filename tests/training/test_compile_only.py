"""Steps that are compiled without being run."""

from types import SimpleNamespace
from typing import Any

import pytest

import train
from helpers.train_cases import recipe
from virst_jax.training import compile_only


@pytest.mark.parametrize(("change", "compiled"), [({}, 1), ({"frozen": "whole"}, 2), ({"frozen_weights": "int8"}, 2)])
def test_stages_share_a_step_if_they_are_alike(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], compiled: int
) -> None:
    config = recipe("image_text")
    config.stage.groups = (("llm/layers/.*/bias", 1.0), (".*", 0.0))
    with config.unlocked():
        config.other = {**config.stage.to_dict(), **change}
    config.stages = ("stage", "other")
    found: list[Any] = []

    def report(*given: Any, **_: Any) -> Any:
        found.append(given)
        return SimpleNamespace(prediction=None)

    monkeypatch.setattr(compile_only.aot, "compile_report", report)
    monkeypatch.setattr(compile_only.aot, "print_report", lambda _: None)
    compile_only.compile_only(config, train.starting_point(config)[0], "cpu:1")
    assert len(found) == compiled
