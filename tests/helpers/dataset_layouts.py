"""Small data sets in every official layout, made of squares that move: what the readers' tests read.

`write_layout(name, root, num_videos=, seed=)` writes all splits of a data set of the registry, `num_videos` samples
each, so that `open_dataset(name, root, split)` opens them. The masks of splits that are public are there; those of
Ref-YouTube-VOS's valid as well, in valid/Annotations, where people keep them who have them.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

COLORS = (("red", (220, 30, 30)), ("green", (30, 200, 30)), ("blue", (40, 60, 230)))
NUM_OBJECTS = len(COLORS)


@dataclass(frozen=True)
class Clip:
    """A video of coloured squares, one of each of COLORS; a later one hides an earlier."""

    frames: np.ndarray  # uint8[T, H, W, 3]
    labels: np.ndarray  # uint8[T, H, W], 0 background, 1... the objects
    names: list[str]

    def mask(self, *objects: int) -> np.ndarray:
        """bool[T, H, W] of objects, counted from 1."""
        return np.isin(self.labels, objects)


def make_clip(seed: int, index: int, num_frames: int | None = None) -> Clip:
    """Clip `index`: its size and length differ from its neighbours'. The last object is gone in the last frame."""
    rng = np.random.default_rng([seed, index])
    height, width = ((48, 64), (40, 56))[index % 2]
    count = num_frames or 6 - index % 2
    labels = np.zeros((count, height, width), np.uint8)
    frames = np.full((count, height, width, 3), 90 + 40 * (index % 2), np.uint8)
    for number, (_, color) in enumerate(COLORS, start=1):
        side = int(rng.integers(9, 14))
        band = width // NUM_OBJECTS  # they start side by side, so that none is hidden in the first frame
        start = np.array([rng.integers(height - side), (number - 1) * band + rng.integers(band - side)])
        step = rng.integers(-2, 3, 2)
        for t in range(count):
            if number == NUM_OBJECTS and t == count - 1 and count > 1:
                continue
            top, left = np.clip(start + t * step, 0, (height - side, width - side))
            labels[t, top : top + side, left : left + side] = number
            frames[t, top : top + side, left : left + side] = color
    return Clip(frames, labels, [f"{5 * t:05d}" for t in range(count)])


def write_layout(name: str, root: Path | str, *, num_videos: int, seed: int) -> None:
    """Writes a data set in its official layout, all splits. `name` as in the registry.

    Raises:
      KeyError: unknown name.
    """
    WRITERS[name](Path(root), num_videos, seed)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def encode(mask: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode()}


def write_frames(folder: Path, clip: Clip) -> None:
    for frame, name in zip(clip.frames, clip.names, strict=True):
        _save(folder / f"{name}.jpg", Image.fromarray(frame), quality=95)


def write_palette(folder: Path, clip: Clip) -> None:
    for labels, name in zip(clip.labels, clip.names, strict=True):
        image = Image.fromarray(labels, "P")
        image.putpalette([0, 0, 0, 236, 95, 103, 249, 145, 87, 250, 200, 99])
        _save(folder / f"{name}.png", image)


def write_binary(folder: Path, masks: np.ndarray, names: list[str]) -> None:
    for mask, name in zip(masks, names, strict=True):
        _save(folder / f"{name}.png", Image.fromarray(mask.astype(np.uint8) * 255))


def _save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def _mevis_split(folder: Path, clips: list[tuple[str, Clip]], meta: str, no_target: bool, masks: bool) -> None:
    videos, codes = {}, {}
    for vid_id, (video, clip) in enumerate(clips):
        write_frames(folder / "JPEGImages" / video, clip)
        first = NUM_OBJECTS * vid_id
        for number in range(NUM_OBJECTS):
            seen = clip.mask(number + 1)
            codes[str(first + number)] = [encode(mask) if mask.any() else None for mask in seen]
        expressions = {
            str(i): {"exp": f"the {color} square", "obj_id": [i], "anno_id": [first + i]}
            for i, (color, _) in enumerate(COLORS)
        }
        every = list(range(NUM_OBJECTS))
        expressions[str(NUM_OBJECTS)] = {"exp": "all  squares", "obj_id": every, "anno_id": [first + i for i in every]}
        if no_target:
            expressions[str(NUM_OBJECTS + 1)] = {"exp": "The purple star", "obj_id": [], "anno_id": []}
        if not masks:
            expressions = {key: {"exp": fields["exp"]} for key, fields in expressions.items()}
        videos[video] = {"vid_id": vid_id, "frames": clip.names, "expressions": expressions}
    write_json(folder / meta, {"videos": videos})
    if masks:
        write_json(folder / "mask_dict.json", codes)


def _clips(prefix: str, num_videos: int, seed: int, offset: int) -> list[tuple[str, Clip]]:
    return [(f"{prefix}{i:02d}", make_clip(seed, offset + i)) for i in range(num_videos)]


def _mevis(root: Path, num_videos: int, seed: int) -> None:
    for k, split in enumerate(("train", "valid_u", "valid")):
        clips = _clips(f"{split}_", num_videos, seed, 100 * k)
        _mevis_split(root / "mevis" / split, clips, "meta_expressions.json", False, split != "valid")


def _mevis_v2(root: Path, num_videos: int, seed: int) -> None:
    for k, split in enumerate(("train", "valid_u", "valid")):
        meta = "meta_expressions_v2_release.json" if split == "valid" else "meta_expressions_v2.json"
        _mevis_split(
            root / "mevis" / split, _clips(f"{split}_", num_videos, seed, 100 * k), meta, True, split != "valid"
        )


def _custom(root: Path, num_videos: int, seed: int) -> None:
    _mevis_split(root, _clips("clip ", num_videos, seed, 0), "meta_expressions.json", False, True)


def _lvvis(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "lvvis" / "train"
    _mevis_split(folder, _clips("", num_videos, seed, 0), "meta_expressions.json", False, True)
    meta = json.loads((folder / "meta_expressions.json").read_text())
    for video in meta["videos"].values():
        for fields in video["expressions"].values():
            fields["exp"] = "_".join(fields["exp"].split())
    write_json(folder / "meta_expressions.json", meta)


def _revos(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "ReVOS"
    videos: dict[str, dict[str, Any]] = {"train": {}, "valid": {}}
    codes: dict[str, Any] = {}
    foreground: dict[str, Any] = {}
    for k, split in enumerate(videos):
        for i in range(num_videos):
            clip, video = make_clip(seed, 100 * k + i), f"UVO/all/-{split}{i}"
            write_frames(folder / "JPEGImages" / video, clip)
            first = len(codes)
            for number in range(1, NUM_OBJECTS + 1):
                codes[str(first + number - 1)] = [encode(m) if m.any() else None for m in clip.mask(number)]
            texts = ["the red square", "What is green here?", "the blue square"]
            expressions = {
                str(n): {"exp": text, "obj_id": [n], "anno_id": [first + n], "type_id": n}
                for n, text in enumerate(texts)
            }
            whole = [n + first for n in range(NUM_OBJECTS)]
            expressions["3"] = {"exp": "which things are there?", "obj_id": [0, 1, 2], "anno_id": whole, "type_id": 1}
            height, width = clip.labels.shape[1:]
            videos[split][video] = {
                "vid_id": i, "frames": clip.names, "height": height, "width": width, "expressions": expressions,
            }  # fmt: skip
            union = clip.labels > 0
            foreground[video] = {
                "masks_rle": [encode(mask) for mask in union],
                "foreground_ratio": [float(mask.mean()) for mask in union],
            }
    for split, entries in videos.items():
        write_json(folder / f"meta_expressions_{split}_.json", {"videos": entries})
    write_json(folder / "mask_dict.json", codes)
    write_json(folder / "mask_dict_foreground.json", foreground)


def _ytvos(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "Ref-Youtube-VOS"
    metas: dict[str, dict[str, Any]] = {"train": {}, "valid": {}, "test": {}}
    objects = {}
    for k, split in enumerate(metas):
        for video, clip in _clips(f"{split}{seed}", num_videos, seed, 100 * k):
            write_frames(folder / split / "JPEGImages" / video, clip)
            expressions = {}
            for exp_id in range(11):  # two digits, to tell the order as text from that as numbers
                target = exp_id % NUM_OBJECTS
                fields = {"exp": f"the {COLORS[target][0]} square, said {exp_id} times"}
                expressions[str(exp_id)] = {**fields, "obj_id": str(target + 1)} if split == "train" else fields
                if split == "valid":
                    place = folder / "valid" / "Annotations" / video / str(exp_id)
                    write_binary(place, clip.mask(target + 1), clip.names)
            metas[split][video] = {"frames": clip.names, "expressions": expressions}
            if split == "train":
                write_palette(folder / "train" / "Annotations" / video, clip)
                objects[video] = {"objects": {str(n + 1): {"category": "frog", "frames": clip.names} for n in range(3)}}
    metas["valid"].update(metas["test"])
    for split, videos in metas.items():
        write_json(folder / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})
    write_json(folder / "train" / "meta.json", {"videos": objects})


def _davis(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "davis17"
    for k, split in enumerate(("train", "valid")):
        videos, objects = {}, {}
        for video, clip in _clips(f"{split}-", num_videos, seed, 100 * k):
            write_frames(folder / split / "JPEGImages" / video, clip)
            write_palette(folder / split / "Annotations" / video, clip)
            expressions = {}
            for exp_id in range(4 * NUM_OBJECTS):
                color = COLORS[exp_id // 4][0]
                fields = {"exp": f"a {color} square, says annotator {exp_id % 4}", "obj_id": str(exp_id // 4 + 1)}
                expressions[str(exp_id)] = fields
            videos[video] = {"frames": clip.names, "expressions": expressions}
            objects[video] = {"objects": {str(n + 1): {"category": "frog"} for n in range(NUM_OBJECTS)}}
        write_json(folder / "meta_expressions" / split / "meta_expressions.json", {"videos": videos})
        write_json(folder / split / "meta.json", {"videos": objects})


def _reasonvos(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "ReasonVOS"
    videos = {}
    for i, (video, clip) in enumerate(_clips("v", num_videos, seed, 0)):
        source = ("MeViS", "BURST")[i % 2]
        write_frames(folder / "JPEGImages" / video, clip)
        expressions = []
        for number in range(1, NUM_OBJECTS + 1):
            write_binary(folder / "Annotations" / f"{source}_{video}_{number}", clip.mask(number), clip.names)
            color = COLORS[number - 1][0]
            text = f"Which thing is {color}?" if number == 1 else f"the {color} thing"
            expressions.append({"exp_id": number, "obj_id": number, "exp_text": text, "is_sent": int(number == 1)})
        videos[video] = {"source": source, "frames": clip.names, "expressions": expressions}
    write_json(folder / "meta_expressions.json", {"videos": videos})


def _still(seed: int, index: int) -> Clip:
    return make_clip(seed, index, num_frames=1)


def _polygon(mask: np.ndarray) -> list[float]:
    """The outline of a square's mask as COCO has it: [x0, y0, x1, y1, ...]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    return [left, top, right, top, right, bottom, left, bottom]


def _refer(name: str, splits: tuple[str, ...], root: Path, num_videos: int, seed: int) -> None:
    folder = root / "refer_seg" / name
    clef = name == "refclef"
    folder_of_images = root / "refer_seg" / ("images/saiapr_tc-12" if clef else "images/mscoco/images/train2014")
    images, refs = [], []
    annotations: list[Any] = []
    for index in range(num_videos * len(splits)):
        clip, split = _still(seed, index), splits[index % len(splits)]
        file_name = f"0{index}/images/{index}.jpg" if clef else f"COCO_train2014_{index:012d}.jpg"
        height, width = clip.labels.shape[1:]
        images.append({"id": 10 + index, "file_name": file_name, "height": height, "width": width})
        _save(folder_of_images / file_name, Image.fromarray(clip.frames[0]), quality=95)
        for number in range(1, NUM_OBJECTS + 1):
            mask = clip.mask(number)[0]
            if not mask.any():
                continue
            ann_id = len(annotations)
            whole = number == NUM_OBJECTS and not clef  # no square lies over the last one, so its outline is its mask
            segmentation = [_polygon(mask)] if whole else [encode(mask)]
            annotation = {"id": ann_id, "image_id": 10 + index, "category_id": number, "segmentation": segmentation}
            annotations.append(annotation)
            color = COLORS[number - 1][0]
            sentences = [
                {"sent_id": 2 * ann_id + n, "sent": text, "raw": text.upper(), "tokens": text.split()}
                for n, text in enumerate((f"the {color} square", f"the square in {color}"))
            ]
            ref = {"ref_id": ann_id, "ann_id": ann_id, "image_id": 10 + index, "category_id": number, "split": split}
            refs.append({**ref, "sent_ids": [s["sent_id"] for s in sentences], "sentences": sentences})
    categories = [{"id": n + 1, "name": color} for n, (color, _) in enumerate(COLORS)]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    (folder / f"refs({'umd' if name == 'refcocog' else 'unc'}).p").write_bytes(pickle.dumps(refs, protocol=2))


def _reasonseg(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "reason_seg"
    explanations = []
    for k, split in enumerate(("train", "val", "test")):
        for i in range(num_videos):
            clip = _still(seed, 100 * k + i)
            image = folder / split / f"{split}_{i}.jpg"
            _save(image, Image.fromarray(clip.frames[0]), quality=95)
            shapes = []
            for number, label in ((NUM_OBJECTS, "target"), (1, "ignore"), (2, "flag")):
                corners = np.reshape(_polygon(clip.mask(number)[0]), (-1, 2)).tolist()
                shapes.append({"label": label, "points": corners})
            is_sentence = i % 2 == 0
            text = ["What is blue here?", "Which square came last?"] if is_sentence else ["the blue square"]
            write_json(image.with_suffix(".json"), {"text": text, "is_sentence": is_sentence, "shapes": shapes})
            if split == "train":
                explanations.append({"image": image.name, "query": text[0], "outputs": "It is blue."})
    write_json(folder / "explanatory" / "train.json", explanations)


def _label_images(
    values: Callable[[np.ndarray], np.ndarray], images: Path, labels: Path, num_videos: int, seed: int
) -> None:
    for i in range(num_videos):
        clip = _still(seed, i)
        _save(images / f"{i:04d}.jpg", Image.fromarray(clip.frames[0]), quality=95)
        _save(labels / f"{i:04d}.png", Image.fromarray(values(clip.labels[0]).astype(np.uint8)))


def _ade20k(root: Path, num_videos: int, seed: int) -> None:
    for part, offset in (("training", 0), ("validation", 1000)):
        folder = root / "sem_seg" / "ade20k"
        # 0 stays unlabelled, the objects are wall, building, sky
        _label_images(lambda x: x, folder / "images" / part, folder / "annotations" / part, num_videos, seed + offset)


def _cocostuff(root: Path, num_videos: int, seed: int) -> None:
    table = np.array([255, 0, 95, 15], np.uint8)  # unlabelled, person, building-other (left out), bird
    for part, offset in (("train2017", 0), ("val2017", 1000)):
        folder = root / "sem_seg"
        places = folder / "coco" / part, folder / "cocostuff" / part
        _label_images(lambda x: table[x], *places, num_videos, seed + offset)


def _mapillary(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "sem_seg" / "mapillary"
    for part, offset in (("training", 0), ("validation", 1000)):
        places = folder / part / "images", folder / part / "v2.0" / "labels"
        _label_images(lambda x: x, *places, num_videos, seed + offset)
    names = ["Ambiguous Barrier", "Bird", "Road", "Sky"]
    write_json(folder / "config_v2.0.json", {"labels": [{"name": n, "readable": n} for n in names]})


def _parts(
    annotations: Path, images: Path, prefix: str, categories: tuple[str, ...], num_videos: int, seed: int
) -> None:
    infos = []
    entries: list[Any] = []
    for i in range(num_videos):
        clip = _still(seed, i)
        height, width = clip.labels.shape[1:]
        infos.append({"id": 7 + i, "file_name": f"{prefix}{i}.jpg", "height": height, "width": width})
        _save(images / f"{prefix}{i}.jpg", Image.fromarray(clip.frames[0]), quality=95)
        for number in range(1, NUM_OBJECTS + 1):
            mask = clip.mask(number)[0]
            if mask.any():
                segmentation = [_polygon(mask)] if number == NUM_OBJECTS else encode(mask)
                entry = {"id": len(entries), "image_id": 7 + i, "category_id": number, "segmentation": segmentation}
                entries.append(entry)
    infos.append({"id": 999, "file_name": "nothing.jpg", "height": 8, "width": 8})  # without annotations
    named = [{"id": n, "name": name} for n, name in enumerate(categories, start=1)]
    write_json(annotations, {"images": infos, "annotations": entries, "categories": named})


def _paco_lvis(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "sem_seg"
    names = ("trash_can", "bottle_(glass):cap_(lid)", "dog:ear")
    for split, offset in (("train", 0), ("val", 1000)):
        path = folder / "vlpart/paco/annotations" / f"paco_lvis_v1_{split}.json"
        _parts(path, folder / "coco", f"{split}2017/", names, num_videos, seed + offset)


def _pascal_part(root: Path, num_videos: int, seed: int) -> None:
    folder = root / "sem_seg" / "vlpart" / "pascal_part"
    for split, offset in (("train", 0), ("val", 1000)):
        images = folder / "VOCdevkit/VOC2010/JPEGImages"
        _parts(
            folder / f"{split}.json", images, split, ("dog:head", "bus:wheel", "cat:tail"), num_videos, seed + offset
        )


def _llava_video(root: Path, num_videos: int, seed: int) -> None:
    entries = []
    for video, clip in _clips("v_", num_videos, seed, 0):
        write_frames(root / "JPEGImages" / "academic_source" / "NextQA" / video, clip)
        asked = ["<image>\nDescribe the video.", "How many squares are there?"]
        answers = ["Squares of three colours move.", "Three."]
        turns = [
            turn
            for q, a in zip(asked, answers)
            for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})
        ]
        path = f"academic_source/NextQA/{video}.mp4"
        entries.append({"id": video, "conversations": turns, "data_source": "0_30_s_academic_v0_1", "video": path})
    write_json(root / "0_30_s_academic_v0_1_cap_processed.json", entries)


def _refer_writer(name: str, splits: tuple[str, ...]) -> Callable[[Path, int, int], None]:
    return lambda root, num_videos, seed: _refer(name, splits, root, num_videos, seed)


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "mevis": _mevis,
    "mevis_v2": _mevis_v2,
    "custom": _custom,
    "ref_youtube_vos": _ytvos,
    "ref_davis17": _davis,
    "revos": _revos,
    "reasonvos": _reasonvos,
    "lvvis": _lvvis,
    "refcoco": _refer_writer("refcoco", ("train", "val", "testA", "testB")),
    "refcoco+": _refer_writer("refcoco+", ("train", "val", "testA", "testB")),
    "refcocog": _refer_writer("refcocog", ("train", "val", "test")),
    "refclef": _refer_writer("refclef", ("train", "val", "testA", "testB", "testC")),
    "reasonseg": _reasonseg,
    "ade20k": _ade20k,
    "cocostuff": _cocostuff,
    "paco_lvis": _paco_lvis,
    "pascal_part": _pascal_part,
    "mapillary": _mapillary,
    "llava_video": _llava_video,
}
