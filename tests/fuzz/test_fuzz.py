"""Some cases of every target of the fuzzer, the same ones each time."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzz.target import Target, find_targets, run_case

CASES = 40  # of a target whose cases take a hundredth of a second or less


@pytest.mark.parametrize("target", find_targets(), ids=lambda target: target.name)
def test_only_results_and_user_errors(target: Target) -> None:
    @settings(
        max_examples=max(10, CASES // target.cost),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def check(case: object) -> None:
        run_case(target, case)

    check()
