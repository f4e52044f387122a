"""Every data set by name: its reader, splits and kind. `open_dataset` is the one way in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from virst_jax.data.datasets import davis, lvvis, mevis, plain, reasonseg, reasonvos, refer, revos, semantic, vqa, ytvos
from virst_jax.data.datasets.source import IndexedSource
from virst_jax.errors import UserError
from virst_jax.io import buckets, remote
from virst_jax.io.address import local


@dataclass(frozen=True)
class DataSet:
    """How a data set is opened."""

    title: str
    group: str  # rvos | refer_seg | reason_seg | sem_seg | video_vqa, as the release groups them
    open: Callable[[Path, str], IndexedSource]
    splits: tuple[str, ...]
    eval_split: str = ""  # the split that is scored by default; empty: training only
    # samples and expressions of the official splits; None: unknown or not worth a check
    official: tuple[tuple[str, int | None, int | None], ...] = ()


def _refer(name: str, title: str) -> DataSet:
    return DataSet(title, "refer_seg", partial(refer.open_refer, name), refer.SPLITS[name], "val")


DATASETS: dict[str, DataSet] = {
    "mevis": DataSet(
        *("MeViS", "rvos", mevis.open_mevis, mevis.SPLITS, "valid_u"),
        official=(("train", 1662, 23051), ("valid_u", 50, 793), ("valid", 140, 2236)),
    ),
    "mevis_v2": DataSet(
        *("MeViS v2", "rvos", mevis.open_mevis_v2, mevis.SPLITS, "valid_u"),
        official=(("valid_u", None, 907), ("valid", None, 2523)),
    ),
    "custom": DataSet("one's own videos", "rvos", mevis.open_custom, ("", *mevis.SPLITS, "val", "test")),
    "ref_youtube_vos": DataSet(
        *("Ref-YouTube-VOS", "rvos", ytvos.open_ytvos, ytvos.SPLITS, "valid"),
        official=(("valid", ytvos.NUM_VALID, None), ("test", 305, None)),
    ),
    "ref_davis17": DataSet(
        *("Ref-DAVIS17", "rvos", davis.open_davis, davis.SPLITS, "valid"),
        official=(("train", 60, None), ("valid", davis.NUM_VALID, None)),
    ),
    "revos": DataSet("ReVOS", "rvos", revos.open_revos, revos.SPLITS, "valid"),
    "reasonvos": DataSet(
        *("ReasonVOS", "rvos", reasonvos.open_reasonvos, reasonvos.SPLITS, "test"), official=(("test", None, 458),)
    ),
    "lvvis": DataSet("LV-VIS", "rvos", lvvis.open_lvvis, lvvis.SPLITS),
    "refcoco": _refer("refcoco", "RefCOCO"),
    "refcoco+": _refer("refcoco+", "RefCOCO+"),
    "refcocog": _refer("refcocog", "RefCOCOg"),
    "refclef": _refer("refclef", "RefCLEF"),
    "reasonseg": DataSet(
        *("ReasonSeg", "reason_seg", reasonseg.open_reasonseg, reasonseg.SPLITS, "val"),
        official=(("train", 239, None), ("val", 200, None), ("test", 779, None)),
    ),
    "ade20k": DataSet("ADE20K", "sem_seg", semantic.open_ade20k, semantic.SPLITS),
    "cocostuff": DataSet("COCO-Stuff", "sem_seg", semantic.open_cocostuff, semantic.SPLITS),
    "paco_lvis": DataSet("PACO-LVIS", "sem_seg", semantic.open_paco_lvis, semantic.SPLITS),
    "pascal_part": DataSet("Pascal-Part", "sem_seg", semantic.open_pascal_part, semantic.SPLITS),
    "mapillary": DataSet("Mapillary Vistas", "sem_seg", semantic.open_mapillary, semantic.SPLITS),
    "llava_video": DataSet("LLaVA-Video", "video_vqa", vqa.open_vqa, vqa.SPLITS),
}

# names of the release and of other repositories -> name and split; "" leaves the split open
ALIASES: dict[str, tuple[str, str]] = {
    "mevis_train": ("mevis", "train"),
    "mevis_valid": ("mevis", "valid_u"),  # sic
    "mevis_test": ("mevis", "valid"),  # sic
    "refytvos": ("ref_youtube_vos", ""),
    "refytvos_train": ("ref_youtube_vos", "train"),
    "refytvos_valid": ("ref_youtube_vos", "valid"),
    "davis17": ("ref_davis17", ""),
    "davis17_train": ("ref_davis17", "train"),
    "davis17_valid": ("ref_davis17", "valid"),
    "revos_train": ("revos", "train"),
    "revos_valid": ("revos", "valid"),
    "lvvis_train": ("lvvis", "train"),
    "reason_seg": ("reasonseg", ""),
    "video_vqa": ("llava_video", ""),
}


def resolve(name: str, split: str = "") -> tuple[str, str]:
    """Registry name and split of a name or alias. Without a split: that of the alias, the one scored, or the first.

    Raises:
      UserError: unknown name or split, or a split that contradicts the alias.
    """
    canonical, implied = ALIASES.get(name, (name, ""))
    if canonical not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split and implied and split != implied:
        raise UserError(f"{name!r} is the split {implied!r} of {canonical}; leave out the split {split!r}")
    data_set = DATASETS[canonical]
    chosen = split or implied or data_set.eval_split or data_set.splits[0]
    if chosen not in data_set.splits:
        splits = ", ".join(filter(None, data_set.splits))
        raise UserError(f"{data_set.title} has no split {chosen!r}: choose one of {splits}")
    return canonical, chosen


# names that folders of data sets go by
_FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "mevis": ("mevis", "mevis_release"),
    "mevis_v2": ("mevis_v2", "mevisv2"),
    "ref_youtube_vos": tuple(name.lower() for name in ytvos.FOLDERS),
    "ref_davis17": tuple(name.lower() for name in davis.FOLDERS),
    "revos": ("revos",),
    "reasonvos": ("reasonvos",),
    "lvvis": ("lvvis", "lv-vis"),
    "reasonseg": ("reason_seg", "reasonseg"),
    "llava_video": ("0_30_s_academic_v0_1", "llava-video-178k"),
    **{name: (name,) for name in ("ade20k", "cocostuff", "mapillary", *refer.SPLITS)},
}


def guess_name(root: str | Path) -> str:
    """The data set that a folder holds, by the folder's name; "custom" for any other with expressions.

    Raises:
      UserError: it cannot be told.
    """
    folder = Path(root).absolute()
    if not folder.is_dir():
        raise UserError(f"{root}: no such folder; give the data set's folder")
    for name, folders in _FOLDER_NAMES.items():
        if folder.name.lower() in folders:
            return name
    if any((folder / file).is_file() for file in (*mevis.META, *mevis.META_V2, plain.TABLE)):
        return "custom"
    raise UserError(f"{root}: cannot tell which data set this is; name it with --dataset ({', '.join(DATASETS)})")


def open_dataset(name: str, root: str | Path, split: str = "") -> IndexedSource:
    """Opens a data set in its official layout.

    Args:
      name: a name of DATASETS or ALIASES.
      root: the data set's folder, or the folder above it that holds several (the release's RVOS_ROOT or LISA). What
        lies in a bucket is copied to this machine first.
      split: one of the data set's splits; by default the one of the alias, the one that is scored, or train.

    Returns:
      A `Source` of `Video`, or of `Question` for the group video_vqa, with `problems` found in the annotations.

    Raises:
      UserError: unknown name or split, a file is missing or not in the layout.
    """
    canonical, chosen = resolve(name, split)
    return DATASETS[canonical].open(_local_root(canonical, root), chosen)


def _local_root(name: str, root: str | Path) -> Path:
    """The folder of a data set on this machine; of a bucket's folder with several video benchmarks the one alone."""
    if not buckets.is_bucket(root):
        return local(root, "data_root")
    if DATASETS[name].group == "rvos":
        for folder in buckets.folders(root):
            if folder.lower() in _FOLDER_NAMES.get(name, ()):
                return remote.fetch(f"{buckets.address_of(root)}/{folder}")
    return remote.fetch(root)
