"""Runs the release's network as it trains: losses, the gradient of every parameter, and steps of AdamW.

The release's forward pass (model/VIRST.py, generation=False, seg_evaluate=False) in training mode, with dropout off and
with the frames that the case names in place of the random ones.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..targets import KEPT, ellipse_masks, thinned
from ..weights_rule import make_input, make_video
from .checkout import Release
from .listening import wrapped


@dataclass(frozen=True)
class Gradients:
    """What a backward pass gives.

    Attributes:
      losses: of the forward pass.
      values: float32 of every parameter that has a gradient, thinned.
      norms: of the whole gradients.
    """

    losses: dict[str, float]
    values: dict[str, np.ndarray]
    norms: dict[str, float]


def run_training(
    release: Release, virst: Any, facts: Mapping[str, Any], targets: np.ndarray, kept: int = KEPT
) -> Gradients:
    """One forward and one backward pass of a train_loss case in float32.

    Args:
      virst: the network, filled.
      facts: the case's JSON.
      targets: bool[T, R, R], the masks of all frames.
      kept: values of a gradient, at most.
    """
    out = _forward(release, virst, facts, [(facts["input_ids"], facts["labels"], targets)])
    out["loss"].backward()
    found = {
        name: parameter.grad.detach().numpy()
        for name, parameter in virst.named_parameters()
        if parameter.grad is not None
    }
    return Gradients(
        losses_of(out),
        {name: thinned(gradient, kept) for name, gradient in found.items()},
        {name: float(np.linalg.norm(gradient.astype(np.float64))) for name, gradient in found.items()},
    )


def run_batch(release: Release, virst: Any, facts: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a train_batch case in float32: conversations about one video or image, padded to one length.

    Args:
      virst: the network, filled.
      facts: the case's JSON.
    """
    import torch

    side = int(facts["image_size"])
    rows: list[Conversation] = []
    for row in facts["conversations"]:
        ellipse = row.get("ellipse")
        targets = ellipse_masks(ellipse, facts["n_frames"], side) if ellipse else None
        rows.append((row["input_ids"], row["labels"], targets))
    with torch.no_grad():
        return losses_of(_forward(release, virst, facts, rows))


Conversation = tuple[list[int], list[int], np.ndarray | None]  # ids, labels, and masks bool[T, R, R] if it has some


def losses_of(out: Mapping[str, Any]) -> dict[str, float]:
    """The losses that a forward pass gives."""
    return {key: float(value) for key, value in out.items() if key == "loss" or key.endswith("_loss")}


def _forward(release: Release, virst: Any, facts: Mapping[str, Any], rows: Sequence[Conversation]) -> Any:
    from PIL import Image
    from torch.nn.utils.rnn import pad_sequence

    import torch

    height, width = facts["hw"]
    video = make_video(facts["n_frames"], height, width, salt=facts.get("video_salt", facts["salt"]))
    transform = release.module("data.transforms").SAM2Transform(size=int(facts["image_size"]))
    side = virst.get_vision_tower().image_processor.size[0]
    clip = make_input(facts["clip"]["name"], (1, facts["t_vlm"], 3, side, side), facts["salt"])
    masked = any(targets is not None for _, _, targets in rows)
    virst.requires_grad_(True)  # the release freezes its vision tower as it builds it
    lengths = torch.tensor([len(ids) for ids, _, _ in rows])
    with without_dropout(virst), _chosen(release, facts):
        return virst(
            input_ids=pad_sequence([torch.tensor(ids) for ids, _, _ in rows], batch_first=True),
            labels=pad_sequence([torch.tensor(labels) for _, labels, _ in rows], batch_first=True, padding_value=-100),
            attention_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            images_clip=torch.from_numpy(clip),
            images_sam=transform([Image.fromarray(frame) for frame in video])[None].float() if masked else None,
            image_ids=[0] * len(rows),
            modalities=[facts.get("modality", "video")] * len(rows),
            gt_masks=[None if masks is None else torch.from_numpy(masks[:, None]).float() for _, _, masks in rows],
            generation=False,
            use_cond_frames=bool(facts["config"].get("use_cond_frames")),
        )


@dataclass(frozen=True)
class Curve:
    """A run of training.

    Attributes:
      losses: float32, of every batch.
      rates: the learning rate of every optimizer step.
      parameters: for some optimizer steps the trained parameters behind them, thinned.
    """

    losses: np.ndarray
    rates: list[float]
    parameters: dict[int, dict[str, np.ndarray]]


def run_curve(virst: Any, facts: Mapping[str, Any]) -> Curve:
    """Trains on the text of a loss_curve case with torch.optim.AdamW, in float32."""
    import torch

    plan, side = facts["optim"], virst.get_vision_tower().image_processor.size[0]
    shape = (1, facts["t_vlm"], 3, side, side)
    batches = [
        {
            "input_ids": torch.tensor([batch["input_ids"]]),
            "labels": torch.tensor([batch["labels"]]),
            "attention_mask": torch.ones(1, len(batch["input_ids"]), dtype=torch.bool),
            "images_clip": torch.from_numpy(make_input(batch["clip"], shape, facts["salt"])),
        }
        for batch in facts["batches"]
    ]
    trained, groups = _groups(virst, facts["groups"], plan)
    optimizer = torch.optim.AdamW(groups, betas=(plan["b1"], plan["b2"]), eps=plan["eps"])
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / plan["warmup_steps"], 1, plan["warmup_steps"] - 1)
    cosine = _Cosine(optimizer, plan)
    losses: list[float] = []
    rates: list[float] = []
    kept: dict[int, dict[str, np.ndarray]] = {}
    with without_dropout(virst):
        for step in range(1, facts["steps"] + 1):
            for _ in range(plan["accumulate"]):
                batch = batches[len(losses) % len(batches)]
                out = virst(**batch, image_ids=[0], modalities=["video"], gt_masks=[None], generation=False)
                (out["loss"] / plan["accumulate"]).backward()
                losses.append(float(out["loss"].detach()))
            torch.nn.utils.clip_grad_norm_(trained.values(), plan["clip_norm"])
            rates.append(min(group["lr"] for group in optimizer.param_groups))
            optimizer.step()
            optimizer.zero_grad()
            (warmup if step < plan["warmup_steps"] else cosine).step()
            if step in facts["kept_steps"]:
                kept[step] = {name: thinned(p.detach().numpy().copy()) for name, p in trained.items()}
    return Curve(np.asarray(losses, np.float32), rates, kept)


class _Cosine:
    """Cosine decay from the full rate to `final_factor` of it, at the steps behind the warmup."""

    def __init__(self, optimizer: Any, plan: Mapping[str, Any]):
        self.optimizer, self.count = optimizer, 0
        self.length, self.final = max(1, plan["total_steps"] - plan["warmup_steps"]), plan["final_factor"]

    def step(self) -> None:
        share = min(self.count / self.length, 1.0)
        factor = self.final + (1 - self.final) * 0.5 * (1 + np.cos(np.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.count += 1


def _groups(
    virst: Any, patterns: Sequence[tuple[str, float]], plan: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The trained parameters, and the optimizer's groups: by factor of the rate, and with decay for matrices only."""
    trained: dict[str, Any] = {}
    groups: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in virst.named_parameters():
        factor = next(factor for pattern, factor in patterns if re.fullmatch(pattern, name))
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            trained[name] = parameter
            groups.setdefault((factor, parameter.ndim > 1), []).append(parameter)
    return trained, [
        {
            "params": members,
            "lr": plan["learning_rate"] * factor,
            "weight_decay": plan["weight_decay"] if decays else 0.0,
        }
        for (factor, decays), members in groups.items()
    ]


@contextlib.contextmanager
def _chosen(release: Release, facts: Mapping[str, Any]) -> Iterator[None]:
    """The case's anchors and tracked frames in place of random ones."""
    import torch

    anchors = torch.tensor(facts["cond_frames"])
    others = torch.tensor([t for t in facts["frames_used"] if t not in facts["cond_frames"]], dtype=torch.long)
    code = release.module("model.VIRST")
    with wrapped(code, "select_keyframes", lambda *_, **__: (anchors, others)):
        yield


@contextlib.contextmanager
def without_dropout(virst: Any) -> Iterator[None]:
    """Training mode in which nothing is dropped."""
    rates = ("p", "dropout_p", "dropout", "drop_prob", "attention_dropout")
    changed = []
    for module in virst.modules():
        for name in rates:
            value = vars(module).get(name)
            if isinstance(value, float) and value > 0:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    virst.train()
    try:
        yield
    finally:
        virst.eval()
        for module, name, value in changed:
            setattr(module, name, value)
