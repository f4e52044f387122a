"""Cases without weights: anchors, metrics, prompts, frame_indices, transforms."""

from pathlib import Path

import jax
import numpy as np

from virst_jax.data import frames, prompts, transforms
from virst_jax.errors import UserError
from virst_jax.evaluation import metrics
from virst_jax.models.sam2.anchors import select_anchors

from .case import Case, exact, within


def _all(case: Case, output: str, wrong: list[str], count: int) -> None:
    note = f"{count} rows" if not wrong else f"{len(wrong)} of {count} rows differ: {'; '.join(wrong[:3])}"
    case.checks.append(exact(output, len(wrong), 0, note))


def run_anchors(case: Case) -> None:
    rows = case.meta["selection"]
    slots = max(len(row["anchors"]) for row in rows)
    select = jax.jit(select_anchors, static_argnums=3)
    wrong = []
    for row in rows:
        count = len(row["anchors"])
        padded = np.pad(row["anchors"], (0, slots - count))
        order, chosen = select(np.int32(row["frame"]), padded, np.arange(slots) < count, row["max_anchors"])
        selected = [int(padded[i]) for i, c in zip(order, chosen) if c]
        rest = [a for a in row["anchors"] if a not in selected]
        if set(selected) != set(row["selected"]) or set(rest) != set(row["unselected"]):
            wrong.append(f"frame {row['frame']} of {row['anchors']}: {selected}")
    _all(case, "selection", wrong, len(rows))
    rows = case.meta["eval_anchors"]
    wrong = [f"T={row['T']}" for row in rows if frames.eval_anchors(row["T"]) != row["anchors"]]
    _all(case, "eval_anchors", wrong, len(rows))


def run_metrics(case: Case) -> None:
    scores: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in "JFAR"}
    for row in case.meta["rows"]:
        height, width = row["h"], row["w"]
        for i, expected in enumerate(zip(*(row[key] for key in "JFAR"))):
            pred, gt, foreground = (_unpack(row[key], i, height, width) for key in ("pred", "gt", "fg"))
            ours = (
                metrics.region_similarity(pred, gt),
                metrics.boundary_f(pred, gt),
                metrics.accuracy(pred, gt),
                metrics.robustness(pred, gt, foreground),
            )
            for key, a, b in zip("JFAR", ours, expected):
                scores[key][0].append(float(a))
                scores[key][1].append(b)
    for key, (ours_, theirs) in scores.items():
        case.checks.append(within(key, ours_, theirs, 1e-9, f"{len(theirs)} masks"))


def _unpack(masks: list[str], index: int, height: int, width: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(masks[index]), np.uint8))
    return bits[: height * width].reshape(height, width)


def run_prompts(case: Case) -> None:
    """Conversations, and where the case has them, chats. What a row does not name keeps its default."""
    folder: Path | None = case.tokenizer
    if folder is None:
        raise UserError(f"{case.name}: needs the Qwen2 tokenizer; give its folder with --tokenizer")
    tokenizer = prompts.load_tokenizer(folder)
    if "seg_token_id" in case.meta:
        case.checks.append(exact("seg_token_id", tokenizer.seg_id, case.meta["seg_token_id"]))
    wrong: dict[str, list[str]] = {"input_ids": [], "labels": [], "conversation": []}
    for row in case.meta["rows"]:
        options = {key: value for key, value in row.items() if key not in wrong}
        prompt = prompts.build_prompt(tokenizer, options.pop("expression"), **options)
        ours = {"input_ids": prompt.input_ids.tolist(), "labels": prompt.labels.tolist()}
        for key, value in {**ours, "conversation": prompt.conversation}.items():
            if value != row[key]:
                wrong[key].append(row["expression"])
    for key, rows in wrong.items():
        _all(case, key, rows, len(case.meta["rows"]))
    chats = case.meta.get("chat", [])
    differ = []
    for row in chats:
        history = [(question, answer) for question, answer in row["history"]]
        prompt = prompts.build_chat(tokenizer, row["question"], time=row["time_message"], history=history)
        text = tokenizer.decode(prompt.input_ids)
        if prompt.input_ids.tolist() != row["input_ids"] or text != row["prompt"].replace("<image>", ""):
            differ.append(row["question"])
    if chats:
        _all(case, "chat", differ, len(chats))


def run_frame_indices(case: Case) -> None:
    keys = ("sample", "fps", "min_num_frames", "max_num_frames", "local_num_frames")
    wrong = []
    for row in case.meta["rows"]:
        ours = frames.get_frame_indices(
            row["num_frames"], row["video_len"], **{key: row[key] for key in keys if key in row}
        )
        if ours != row["indices"]:
            wrong.append(str({key: row[key] for key in row if key != "indices"}))
    _all(case, "indices", wrong, len(case.meta["rows"]))


def run_transforms(case: Case) -> None:
    out, video = case.outputs, case.outputs["video"]
    pixel = 1 / 255
    ours = transforms.vlm_pixels(video, 8 * out["vlm"].shape[-1])[:, ::8, ::8]
    case.checks.append(within("vlm", ours.transpose(0, 3, 1, 2), out["vlm"], pixel / transforms.STD.min()))
    size = 16 * out["sam_bilinear"].shape[-1]
    ours = transforms.sam_pixels(video, size, "bilinear")[:, ::16, ::16].transpose(0, 3, 1, 2)
    case.checks.append(within("sam_bilinear", ours, out["sam_bilinear"], 1e-6, "the same PIL call"))
    ours = transforms.resize_frames(video[:1], size, "bicubic")[0, ::16, ::16].transpose(2, 0, 1) / np.float32(255)
    case.checks.append(within("sam_track_unnormalised", ours, out["sam_track_unnormalised"], 1e-6, "the same PIL call"))
    masks = transforms.masks_to_size(out["masks"], size)[:, ::4, ::4]
    case.checks.append(exact("mask_1024", np.packbits(masks), out["mask_1024"]))
