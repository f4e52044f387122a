"""Some hundreds of mutated checkpoint files; `tests/fuzz` runs more."""

import tracemalloc
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")

from fuzz.targets.checkpoints import CHECKS  # noqa: E402


@pytest.mark.parametrize("target", CHECKS)
def test_a_mutated_checkpoint_is_read_or_refused(tmp_path_factory, target):
    inputs, check = CHECKS[target]
    folder: Path = tmp_path_factory.mktemp(target)

    @hypothesis.settings(
        max_examples=300,
        deadline=5000,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def run(data: bytes) -> None:
        check(data, folder)

    tracemalloc.start()
    try:
        run()
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
