"""No step of virst_7b becomes dearer on a TPU unseen: benchmarks/predicted_steps.json holds what it took.

Compiling takes minutes a step, so it is done only when VIRST_PREDICT_STEPS=1 is set; CONTRIBUTING.md says how, and how
the figures are recorded anew.
"""

import os

import pytest

from benchmarks.accelerator_parts import STAGES
from helpers.places import ROOT
from virst_jax.commands import compile as command
from virst_jax.io.json_files import read_json
from virst_jax.profiling import aot

FIGURES = ROOT / "benchmarks" / "predicted_steps.json"
MODEL, TOPOLOGY, FRAMES = "virst_7b", "v5e:1x1", 64
DEARER = 1.1  # the compiler's own choices move a step by some percent
RECORDED = read_json(FIGURES).value[MODEL][TOPOLOGY]["1"]


def dearer(recorded: dict[str, float], slow: float, fast: float) -> list[str]:
    """What a step takes more than was recorded; both figures count, in ms."""
    found = {"slow": slow, "fast": fast}
    return [
        f"{name}: {value:.2f} ms, recorded {recorded[name]:.2f}"
        for name, value in found.items()
        if value > DEARER * recorded[name]
    ]


def test_a_step_that_became_dearer_is_told():
    recorded = {"slow": 10.0, "fast": 5.0}
    assert dearer(recorded, 10.9, 5.4) == []
    assert dearer(recorded, 11.1, 5.4) == ["slow: 11.10 ms, recorded 10.00"]
    assert dearer(recorded, 9.0, 6.0) == ["fast: 6.00 ms, recorded 5.00"]


def test_recorded_steps_exist():
    for model, topologies in read_json(FIGURES).value.items():
        for topology, by_count in topologies.items():
            kind = topology.partition(":")[0]
            assert kind in aot.PEAKS, topology
            for rows in by_count.values():
                wanted = {"roofline", "operations"} if kind in aot.GPUS else {"slow", "fast"}
                assert all(wanted <= set(row) for row in rows.values())
                assert model != MODEL or set(rows) <= set(STAGES)


@pytest.mark.heavy
@pytest.mark.skipif(os.environ.get("VIRST_PREDICT_STEPS") != "1", reason="set VIRST_PREDICT_STEPS=1: minutes a step")
@pytest.mark.parametrize("name", RECORDED)
def test_no_step_became_dearer(name):
    pytest.importorskip("libtpu", reason="libtpu predicts: pip install 'virst-jax[aot]'")
    params, calls = command.steps_for(command._config(MODEL, "bfloat16"), TOPOLOGY, FRAMES, 1)
    call = next(call for call in calls if call.name == name)
    found = command.compile_step(call, params, TOPOLOGY).prediction
    assert found is not None
    assert not dearer(RECORDED[name], 1e3 * found.slow.seconds, 1e3 * found.fast.seconds)
