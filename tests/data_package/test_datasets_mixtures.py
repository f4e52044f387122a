import pytest

from virst_jax.data.datasets import mixtures
from virst_jax.data.datasets.registry import DATASETS


@pytest.mark.parametrize("stage", ["STAGE1", "STAGE2", "STAGE3"])
def test_weights(stage):
    weights = getattr(mixtures, stage)
    assert sum(weights.values()) == pytest.approx(1)
    assert all("train" in DATASETS[name].splits for name in weights)


def test_groups_keep_their_shares():
    for group, share in mixtures.GROUPS.items():
        members = [name for name in mixtures.STAGE2 if DATASETS[name].group == group]
        assert set(members) == set(mixtures.MEMBERS[group])
        assert sum(mixtures.STAGE2[name] for name in members) == pytest.approx(share / 29)
    assert mixtures.STAGE2["mevis"] == pytest.approx(12 / 29 * 4000 / 25400)
    assert mixtures.STAGE1["ade20k"] == pytest.approx(9 / 17 / 5)
    assert not any(DATASETS[name].group == "rvos" for name in mixtures.STAGE1)


def test_an_unknown_group():
    with pytest.raises(KeyError):
        mixtures.mixture({"cats": 1})
