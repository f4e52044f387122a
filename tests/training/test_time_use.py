"""Seconds by what they were spent on."""

from virst_jax.training.time_use import STEPS, TimeUse


def test_laps_are_summed_by_kind():
    times = iter([10.0, 12.0, 13.0, 15.0, 20.0])
    use = TimeUse(lambda: next(times))
    assert use.share("data") == 0
    for kind in ("start", "data", STEPS, STEPS):
        use.lap(kind)
    assert dict(use.seconds) == {"start": 2, "data": 1, STEPS: 7}
    assert use.share("data") == 0.1
    assert use.share("evaluation") == 0
    assert use.summary() == "0.2 min: steps 70% (goodput), start 20%, data 10%"
