"""The folders that training starts from and leaves: those of whole models, and of trackers alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from virst_jax.config import FLOAT, TrackerConfig, VirstConfig, weights_of
from virst_jax.errors import UserError
from virst_jax.io import model_folder, tracker_folder
from virst_jax.types import Params, PyTree

if TYPE_CHECKING:
    from virst_jax.io.buckets import Place


def read_config(folder: Path) -> VirstConfig:
    """The network in a folder; a tracker's is a TrackerConfig.

    Raises:
      UserError: no model folder, a broken config, or integer kernels, which have no gradients.
    """
    if tracker_folder.is_tracker(folder):
        return TrackerConfig(sam2=tracker_folder.read_config(folder))
    cfg = model_folder.read_config(folder)
    check_trainable(cfg, str(folder))
    return cfg


def check_trainable(cfg: VirstConfig, where: str) -> None:
    """Raises UserError: the network has integer kernels."""
    if integers := [f"{part} {weights}" for part, weights in weights_of(cfg).items() if weights != FLOAT]:
        raise UserError(
            f"{where}: has integer kernels ({', '.join(integers)}), which cannot be trained; start from the model that "
            "it was made of, and quantize the result"
        )


def load(folder: Path, shardings: PyTree) -> tuple[VirstConfig, PyTree]:
    """The network in a folder and its parameters, in trees like those of `Virst`.

    Raises:
      UserError: as of `model_folder.load_model`.
    """
    if tracker_folder.is_tracker(folder):
        cfg, params = tracker_folder.load_tracker(folder, shardings=shardings["sam2"])
        return TrackerConfig(sam2=cfg), {"sam2": params}
    return model_folder.load_model(folder, shardings=shardings)


def save(folder: "Place", cfg: VirstConfig, params: Params, tokenizer: Path) -> None:
    """Writes a folder that `load` reads; arguments as of `model_folder.save_model`."""
    if isinstance(cfg, TrackerConfig):
        tracker_folder.save_tracker(folder, cfg.sam2, params["sam2"])
    else:
        model_folder.save_model(folder, cfg, params, tokenizer)


def is_whole(folder: "Place", cfg: VirstConfig) -> bool:
    """Whether such a folder is there. Raises UserError: as of `model_folder.is_whole`."""
    name = tracker_folder.CONFIG if isinstance(cfg, TrackerConfig) else model_folder.CONFIG
    return model_folder.is_whole(folder, name)
