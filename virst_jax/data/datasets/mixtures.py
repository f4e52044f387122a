"""How often each data set is drawn in training. Data for the recipes.

From the defaults of data/hybrid_dataset.py (groups, and video sets within rvos), data/sem_seg_dataset.py,
data/refer_seg_dataset.py (sets within these groups are drawn evenly) and utils/argument.py of the release. Its scripts
for the stages are not public; that stage 1 leaves the group rvos out is this project's reading of the paper.
"""

from collections.abc import Mapping

EXPLANATORY = 0.1  # part of the ReasonSeg samples with an explanation that are answered in text alone

# hybrid_dataset.py: dataset and sample_rate; "vqa" (3) stands in that list but has no reader in the release
GROUPS: dict[str, float] = {"sem_seg": 9, "refer_seg": 3, "reason_seg": 1, "video_vqa": 4, "rvos": 12}
SEM_SEG: dict[str, float] = {"ade20k": 1, "cocostuff": 1, "pascal_part": 1, "paco_lvis": 1, "mapillary": 1}
REFER_SEG: dict[str, float] = {"refclef": 1, "refcoco": 1, "refcoco+": 1, "refcocog": 1}
REASON_SEG: dict[str, float] = {"reasonseg": 1}
VIDEO_VQA: dict[str, float] = {"llava_video": 1}
# hybrid_dataset.py: rvos_seg_data and rvos_sample_ratio
RVOS: dict[str, float] = {
    "mevis": 4000,
    "ref_youtube_vos": 15000,
    "ref_davis17": 400,
    "revos": 3000,
    "lvvis": 3000,
}
MEMBERS: dict[str, dict[str, float]] = {
    "sem_seg": SEM_SEG,
    "refer_seg": REFER_SEG,
    "reason_seg": REASON_SEG,
    "video_vqa": VIDEO_VQA,
    "rvos": RVOS,
}


def mixture(groups: Mapping[str, float]) -> dict[str, float]:
    """Weight of every data set, summing to 1: that of its group times its part of the group.

    Args:
      groups: weight of groups, as GROUPS.

    Raises:
      KeyError: an unknown group.
    """
    total = sum(groups.values())
    return {
        name: weight / total * part / sum(MEMBERS[group].values())
        for group, weight in groups.items()
        for name, part in MEMBERS[group].items()
    }
