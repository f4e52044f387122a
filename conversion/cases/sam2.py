"""Cases of the original SAM 2.1: sam2_image_* and sam2_video_*, its predictors, and sam2_blocks, at full width.

Axes: T frames, O objects, S side of the tracker's image, L mask side, M masks.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virst_jax.config import SAM2_SIZES, Compute, Sam2Config, sam2_preset
from virst_jax.data.transforms import sam_pixels
from virst_jax.inference.objects import Outcome
from virst_jax.inference.prompts import check_clicks
from virst_jax.inference.session import Session
from virst_jax.inference.tracker_steps import TrackerNetwork, TrackerSteps
from virst_jax.io.video import open_video
from virst_jax.models.sam2.hiera import Block, block_specs
from virst_jax.models.sam2.mask_decoder import Masks, multimask, single_mask
from virst_jax.models.sam2.prompted import PromptTokens
from virst_jax.models.sam2.sam2 import Sam2
from virst_jax.models.sam2.tracker import PROMPT_LOGIT_LIMIT

from ..rules import Target, hiera_rules
from ..targets import ellipse_mask
from ..tracker import tracker_table
from ..weights_rule import make_input, make_video
from .case import Case, Check, close, within

LOGITS = 1e-3  # relative L2 error of masks, pointers and scores behind a whole network
BFLOAT16_STEP = 2.0**-7  # of a value: memories keep 8 significant bits, and one on the border falls to either side
TRUNK = "image_encoder.trunk"


def _config(case: Case) -> Sam2Config:
    """The published size with the case's narrow image encoder and small image."""
    published = sam2_preset(case.meta["size"])
    width = case.meta["manifest"][f"{TRUNK}.patch_embed.proj.weight"][0]
    return dataclasses.replace(
        published, hiera=dataclasses.replace(published.hiera, embed_dim=width), image_size=case.meta["image_size"]
    )


def _params(case: Case, cfg: Sam2Config) -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, case.params(list(tracker_table(cfg).items())))


def _video(case: Case) -> np.ndarray:
    height, width = case.meta["hw"]
    return make_video(case.meta["n_frames"], height, width, salt=case.salt)


def run_sam2_image(case: Case) -> None:
    """Masks of an image from clicks, boxes and an earlier mask: all three, or the one that is stable."""
    cfg = _config(case)
    params, sam = _params(case, cfg), Sam2(cfg, Compute(dtype=case.dtype))
    image = _video(case)
    features = sam.apply({"params": params}, sam_pixels(image, cfg.image_size), method=Sam2.encode_image)
    frame = jax.tree.map(lambda x: x[0], features)

    def decode(sam: Sam2, tokens: PromptTokens, previous: jax.Array | None, several: bool) -> Masks:
        count = tokens.coords.shape[1]
        labels = jnp.where(jnp.arange(count) < tokens.count[:, None], tokens.labels, -1)
        there = jnp.pad(labels != -1, ((0, 0), (0, 1)), constant_values=True)
        encoder = sam.prompt_encoder
        masks = sam.mask_decoder(
            sam.without_memory(frame, 1),
            encoder.dense_position(),
            sam.embed_points(tokens.coords, labels),
            encoder.no_mask(1) if previous is None else encoder.masks(previous),
            (frame.high0[None], frame.high1[None]),
            there,
        )
        return multimask(masks) if several else single_mask(masks, sam.cfg)

    apply: Any = functools.partial(sam.apply, method=decode)
    run = jax.jit(lambda params, *args: apply({"params": params}, *args), static_argnums=3)
    ours: dict[int, np.ndarray] = {}
    for number, prompt in enumerate(case.meta["prompts"]):
        clicks = check_clicks(image.shape[1:3], prompt.get("points"), prompt.get("labels"), prompt.get("box"))
        tokens = clicks.tokens(image.shape[1:3], cfg.image_size)
        previous = None if "previous" not in prompt else jnp.asarray(ours[prompt["previous"]][:1])
        masks = run(params, tokens, previous, prompt["several"])
        # the original's image predictor clamps what it hands out
        ours[number] = np.clip(np.asarray(masks.logits[0]), -PROMPT_LOGIT_LIMIT, PROMPT_LOGIT_LIMIT)
        asked = _clicks(len(clicks.coords))
        given = " and ".join(x for x in ("a box" * ("box" in prompt), asked * ("points" in prompt)) if x)
        name = f"{given}{' on a mask' if previous is not None else ''}, {'all' if prompt['several'] else 'stable'}"
        case.checks.append(close(f"{name}: masks", ours[number], case.outputs[f"{number}.logits"], LOGITS))
        case.checks.append(close(f"{name}: IoU", masks.ious[0], case.outputs[f"{number}.ious"], LOGITS))


def run_sam2_video(case: Case) -> None:
    """A session that does what the case says: clicks, boxes and masks of several objects, tracking, corrections."""
    cfg = _config(case)
    network = TrackerNetwork(TrackerSteps(cfg, Compute(dtype=case.dtype)), _params(case, cfg))
    video = _video(case)
    session = Session(network, open_video(video))
    for number, operation in enumerate(case.meta["operations"]):
        found: Mapping[tuple[int, int], Outcome]
        if operation["do"] == "track":
            way = "backward" if operation.get("backward") else "forward"
            passed = [shown.index for shown in session.propagate(operation["start"], direction=way)]
            found = {(o, t): session.outcome(o, t) for o in session.object_ids for t in passed}
            title = f"{number}: {way} from {operation['start']}"
        else:
            _prompt(session, operation, video.shape[1:3])
            key = operation["object"], operation["frame"]
            found = {key: session.outcome(*key)}
            title = f"{number}: {_words(operation)}"
        _compare(case, number, title, found)


def _prompt(session: Session, operation: Mapping[str, Any], size: tuple[int, int]) -> None:
    object_id, frame = operation["object"], operation["frame"]
    if operation["do"] == "mask":
        session.add_mask(object_id, frame, ellipse_mask(operation["ellipse"], *size))
        return
    session.add_points(
        object_id,
        frame,
        operation.get("points"),
        operation.get("labels"),
        box=operation.get("box"),
        replace=operation.get("replace", True),
    )


def _words(operation: Mapping[str, Any]) -> str:
    points = len(operation.get("points") or ())
    parts = ["a box"] * ("box" in operation) + [_clicks(points)] * bool(points)
    what = "a mask" if operation["do"] == "mask" else " and ".join(parts)
    return f"{what}, frame {operation['frame']}"


def _clicks(count: int) -> str:
    return "a click" if count == 1 else f"{count} clicks"


def _compare(case: Case, number: int, title: str, found: Mapping[tuple[int, int], Outcome]) -> None:
    """One check for each kind of array, of the worst object and frame."""
    out = case.outputs
    rows: dict[str, list[tuple[float, float, str]]] = {"mask": [], "pointer": []}
    ours: list[float] = []
    theirs: list[float] = []
    memories: list[float] = []
    expected = {name.rsplit(".", 1)[0] for name in out if name.startswith(f"{number}.")}
    told = {f"{number}.{object_id}.{frame}" for object_id, frame in found}
    if expected != told:
        case.checks.append(Check(title, False, note=f"objects and frames differ: {sorted(expected ^ told)[:4]}"))
        return
    for (object_id, frame), outcome in found.items():
        name = f"{number}.{object_id}.{frame}"
        for kind, value in (("mask", outcome.low_res[::2, ::2]), ("pointer", outcome.pointer)):
            check = close(kind, value, out[f"{name}.{kind}"], LOGITS)
            rows[kind].append((check.relative or 0.0, check.max_abs or 0.0, f"object {object_id}, frame {frame}"))
        ours.append(outcome.score)
        theirs.append(float(out[f"{name}.score"]))
        if f"{name}.memory" in out:
            memory = np.asarray(outcome.memory, np.float32).T[::8]
            given = out[f"{name}.memory"].reshape(memory.shape)
            memories.append(float(np.abs(memory - given).max() / np.abs(given).max()))
    for kind, values in rows.items():
        relative, largest, where = max(values)
        case.checks.append(Check(f"{title}: {kind}", relative <= LOGITS, largest, relative, note=f"worst: {where}"))
    signs = int((np.sign(ours) != np.sign(theirs)).sum())
    scores = within(f"{title}: score", ours, theirs, LOGITS * max(1.0, float(np.abs(theirs).max())))
    case.checks.append(dataclasses.replace(scores, passed=scores.passed and not signs, note=f"{signs} of other sign"))
    if memories:
        worst = max(memories)
        note = "share of the largest value, stored in bfloat16"
        case.checks.append(Check(f"{title}: memory", worst <= BFLOAT16_STEP, worst, note=note))


def run_sam2_blocks(case: Case) -> None:
    """Blocks of every published size at full width, on a grid that its windows do not divide evenly."""
    for size, numbers in case.meta["blocks"].items():
        hiera = SAM2_SIZES[size]
        rules = dict(hiera_rules(hiera, TRUNK, "trunk"))
        specs = block_specs(hiera)
        for number in numbers:
            start = f"{TRUNK}.blocks.{number}."
            table = [
                (f"{size}/{name}", Target("/".join(target.path.split("/")[2:]), None, target.transform))
                for name, target in rules.items()
                if name.startswith(start)
            ]
            one = Case(case.name, {"manifest": {n: case.meta["manifest"][n] for n, _ in table}, "salt": case.salt}, {})
            spec = specs[number]
            theirs = case.outputs[f"{size}.{number}"]
            side = case.meta["grid"]
            x = make_input(f"{size}.{number}", (1, side, side, spec.dim), case.salt)
            block = Block(spec, hiera.mlp_ratio, Compute(dtype=case.dtype))
            ours, _ = jax.jit(block.apply)({"params": one.params(table)}, x)
            kind = "global" if not spec.window else f"windows of {spec.window}{', pooled' if spec.pool else ''}"
            name = f"{size} block {number}, {spec.dim_out} wide, {kind}"
            case.checks.append(close(name, ours[0, ::4, ::4, ::4], theirs))
