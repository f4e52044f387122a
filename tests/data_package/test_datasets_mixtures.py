import pytest

from virst_jax.data.datasets import mixtures
from virst_jax.data.datasets.registry import DATASETS

ALL = mixtures.mixture(mixtures.GROUPS)
NO_VIDEOS = mixtures.mixture({group: weight for group, weight in mixtures.GROUPS.items() if group != "rvos"})


@pytest.mark.parametrize("weights", [ALL, NO_VIDEOS], ids=["all", "no_videos"])
def test_weights(weights):
    assert sum(weights.values()) == pytest.approx(1)
    assert all("train" in DATASETS[name].splits for name in weights)


def test_groups_keep_their_shares():
    for group, share in mixtures.GROUPS.items():
        members = [name for name in ALL if DATASETS[name].group == group]
        assert set(members) == set(mixtures.MEMBERS[group])
        assert sum(ALL[name] for name in members) == pytest.approx(share / 29)
    assert ALL["mevis"] == pytest.approx(12 / 29 * 4000 / 25400)
    assert NO_VIDEOS["ade20k"] == pytest.approx(9 / 17 / 5)
    assert not any(DATASETS[name].group == "rvos" for name in NO_VIDEOS)


def test_an_unknown_group():
    with pytest.raises(KeyError):
        mixtures.mixture({"cats": 1})
