"""Small made-up scenes of moving shapes, rendered exactly: what the synthetic data set is about.

A scene is a muted background and two to five shapes in front of it. Every shape has a colour, a form, a size, a
texture, one motion and a lifetime. Centres are whole pixels, so a shape is drawn once and then pasted: a frame costs
microseconds, and a mask is exactly the visible part (antialiased pixels belong to a shape from half coverage on).

Axes: K objects from back to front, T frames of the scene, n frames asked for, H height, W width.
"""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# near the corners of the RGB cube, hence far apart; backgrounds stay near its middle
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "green": (32, 178, 48),
    "blue": (36, 64, 226),
    "yellow": (240, 222, 32),
    "cyan": (44, 214, 226),
    "pink": (236, 68, 204),
    "white": (246, 246, 246),
    "black": (14, 14, 14),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = {"small": (9.0, 10.5), "large": (17.0, 19.0)}  # radius in pixels of an image with a shorter side of 128
TEXTURES = ("plain", "striped", "dotted")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
MOTIONS = ("still", *DIRECTIONS, "circle")
TRAVEL = 0.36  # of the frame's side: what every moving shape covers at least
CANDIDATES = 12  # paths drawn for an object before the least crowded is taken

# What a scene can be made to contain; the words of text.py need them.
PLOTS = ("late", "early", "return", "first", "against", "rest", "like", "odd", "extreme", "hidden")


@dataclass(frozen=True, eq=False)
class Stamp:
    """A drawn shape, R + 1 + R pixels on a side."""

    alpha: np.ndarray  # float32[S, S], coverage
    paint: np.ndarray  # float32[S, S, 3], RGB times coverage
    mask: np.ndarray  # bool[S, S], coverage of at least one half
    area: int  # pixels of the mask


@dataclass(frozen=True, eq=False)
class SceneObject:
    """A shape of a scene: its attributes, and where it is."""

    color: str
    shape: str
    size: str
    texture: str
    motion: str
    centers: np.ndarray  # int[T, 2], x and y in pixels
    present: np.ndarray  # bool[T], False where it has vanished
    stamp: Stamp


@dataclass(frozen=True, eq=False)
class Scene:
    """Objects from back to front. Areas are pixels of masks, exact."""

    size: tuple[int, int]  # height, width
    num_frames: int
    objects: tuple[SceneObject, ...]
    background_seed: int
    inside: np.ndarray  # int[K, T], area within the frame
    visible: np.ndarray  # int[K, T], of that, what no other object covers
    covered: np.ndarray  # int[K, K, T], area of the second object that the first, in front of it, lies upon

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Frames as uint8[n, H, W, 3], RGB; only these are rendered."""
        out = np.empty((len(indices), *self.size, 3), np.uint8)
        out[:] = self.background
        for image, t in zip(out, indices):
            for thing in self.objects:
                place = _place(thing, t, self.size)
                if place is not None:
                    frame, patch = place
                    shade = image[frame] * (1 - thing.stamp.alpha[patch][..., None])
                    image[frame] = shade + thing.stamp.paint[patch] + 0.5
        return out

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """The foremost object of every pixel: uint8[n, H, W], its number from 1 on, 0 for the background."""
        out = np.zeros((len(indices), *self.size), np.uint8)
        for image, t in zip(out, indices):
            for number, thing in enumerate(self.objects, 1):
                place = _place(thing, t, self.size)
                if place is not None:
                    frame, patch = place
                    image[frame][thing.stamp.mask[patch]] = number
        return out

    def masks(self, targets: Collection[int], indices: Sequence[int]) -> np.ndarray:
        """Visible parts of some objects together: bool[n, H, W]."""
        labels, meant = self.labels(indices), np.zeros((len(indices), *self.size), bool)
        for k in targets:
            meant |= labels == k + 1
        return meant

    @functools.cached_property
    def background(self) -> np.ndarray:
        """uint8[H, W, 3]: a gradient between two muted colours, faint clouds and fainter grain."""
        height, width = self.size
        rng = np.random.default_rng(self.background_seed)
        ends = (rng.uniform(95, 160) + rng.uniform(-16, 16, (2, 3))).astype(np.float32)
        turn = rng.uniform(0, 2 * math.pi)
        y, x = np.linspace(-0.7, 0.7, height)[:, None], np.linspace(-0.7, 0.7, width)
        ramp = (0.5 + 0.5 * (x * math.cos(turn) + y * math.sin(turn))).astype(np.float32)
        clouds = Image.fromarray(rng.uniform(-9, 9, (7, 7)).astype(np.float32))
        ground = ends[0] + ramp[..., None] * (ends[1] - ends[0])
        ground += np.asarray(clouds.resize((width, height), Image.Resampling.BILINEAR))[..., None]
        ground += rng.integers(-4, 5, (height, width, 1), np.int8)
        return ground.astype(np.uint8)


def draw_stamp(shape: str, color: str, texture: str, radius: float) -> Stamp:
    """Draws a shape by its signed distance.

    Args:
      radius: of the circle around it, pixels.
    """
    reach = math.ceil(radius) + 1
    x, y = np.arange(-reach, reach + 1, dtype=np.float32), np.arange(-reach, reach + 1, dtype=np.float32)[:, None]
    alpha = np.clip(0.5 - _distance(shape, x, y, radius), 0, 1)
    rgb = np.broadcast_to(np.array(COLORS[color], np.float32), (*alpha.shape, 3))
    if texture != "plain":
        second = 0.45 * rgb + 0.55 * {"black": 120, "blue": 255, "white": 150}.get(color, 40)  # apart from backgrounds
        pitch = radius / 1.8
        if texture == "striped":
            on = (x + y) % pitch < 0.4 * pitch
        else:
            on = np.hypot(x % pitch - pitch / 2, y % pitch - pitch / 2) < 0.31 * pitch
        rgb = np.where(on[..., None], second, rgb)
    mask = alpha >= 0.5
    return Stamp(alpha, (rgb * alpha[..., None]).astype(np.float32), mask, int(mask.sum()))


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels, negative within; exact near the edges, which is where it counts."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - radius, short - 0.32 * radius)
    if shape == "triangle":  # half-planes whose normals point down, up left and up right
        y = y - 0.18 * radius
        slope = np.abs(x) * math.cos(math.pi / 6) - y * 0.5
        return np.maximum(slope, y) - 0.55 * radius
    # star: fold the plane into half of one of five points, then the distance to that half's edge
    sector = math.pi / 5
    angle = np.arctan2(x, -y)  # from straight up
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    across, along = np.hypot(x, y) * np.sin(folded), np.hypot(x, y) * np.cos(folded)
    inner = 0.48 * radius
    edge = np.array([inner * math.sin(sector), inner * math.cos(sector) - radius])
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return (across * normal[0] + (along - radius) * normal[1]).astype(np.float32)


def make_scene(
    rng: np.random.Generator, size: tuple[int, int], num_frames: int, plots: Collection[str] = ()
) -> Scene | None:
    """Draws a scene; None if it came out too crowded (then draw again).

    Args:
      size: height and width, pixels.
      num_frames: T; one frame makes a scene without motion.
      plots: of PLOTS, what to make likely.
    """
    long = num_frames > 1
    least = 3 if {"against", "rest", "odd", "first"} & set(plots) else 2
    count = int(rng.choice(np.arange(least, 6), p=_normal([2, 4, 3, 2][least - 2 :])))
    looks = _choose_looks(rng, count, plots)
    motions = _choose_motions(rng, count, plots) if long else ["still"] * count
    lifetimes = _choose_lifetimes(rng, count, plots) if long else ["whole"] * count
    unit = min(size) / 128
    objects: list[SceneObject] = []
    for k, (color, shape, extent, texture) in enumerate(looks):
        radius = float(rng.uniform(*SIZES[extent])) * unit
        paths, present = _draw_paths(rng, motions[k], lifetimes[k], radius, size, num_frames)
        behind = objects[0] if "hidden" in plots and long and k == count - 1 else None
        if behind is not None:  # cross the hindmost object
            axis = 1 if DIRECTIONS[motions[k]][0] else 0
            paths[:, :, axis] = behind.centers[:, axis]
        best = _least_crowded(rng, paths, present, radius, objects, unit, behind)
        if best is None:
            return None
        stamp = draw_stamp(shape, color, texture, radius)
        centers = np.rint(paths[best]).astype(int)
        objects.append(SceneObject(color, shape, extent, texture, motions[k], centers, present, stamp))
    scene = _measure(size, num_frames, tuple(objects), int(rng.integers(2**31)))
    area = np.array([thing.stamp.area for thing in objects])
    seen = (scene.visible >= 0.6 * area[:, None]).mean(1)
    return scene if seen.min() >= 0.35 else None


def _normal(weights: Sequence[float]) -> np.ndarray:
    return np.array(weights) / sum(weights)


def _choose_looks(rng: np.random.Generator, count: int, plots: Collection[str]) -> list[tuple[str, str, str, str]]:
    """Colour, shape, size and texture of each object; colour and shape together are unique."""
    colors, shapes = rng.permutation(list(COLORS)).tolist(), rng.permutation(SHAPES).tolist()
    if "odd" in plots:
        odd = int(rng.integers(count))
        if rng.random() < 0.5:
            pairs = [(colors[k == odd], shapes[k]) for k in range(count)]
        else:
            pairs = [(colors[k], shapes[k == odd]) for k in range(count)]
    else:
        pairs = []
        while len(pairs) < count:
            color, shape = colors[len(pairs)], shapes[len(pairs)]
            if pairs and (share := rng.random()) < 0.7:  # distractors: words must be read to the end
                other = pairs[rng.integers(len(pairs))]
                color, shape = (other[0], shape) if share < 0.35 else (color, other[1])
            pairs.append((color, shape))
    sizes = rng.choice(list(SIZES), count).tolist()
    if "extreme" in plots:
        one, rest = rng.permutation(list(SIZES)).tolist()
        sizes = [rest] * count
        sizes[rng.integers(count)] = one
    if "hidden" in plots:
        sizes[0], sizes[-1] = "small", "large"
        full = [k for k, (_, shape) in enumerate(pairs) if shape in ("circle", "square")]
        if full:
            pairs.append(pairs.pop(full[0]))
    textures = rng.choice(TEXTURES, count, p=[0.6, 0.2, 0.2]).tolist()
    return [(color, shape, size, texture) for (color, shape), size, texture in zip(pairs, sizes, textures)]


def _choose_motions(rng: np.random.Generator, count: int, plots: Collection[str]) -> list[str]:
    one = int(rng.integers(count))
    ways = rng.permutation(list(DIRECTIONS)).tolist()
    if "against" in plots:
        motions = [ways[0]] * count
        motions[one] = OPPOSITE[ways[0]]
    elif "rest" in plots:
        motions = rng.choice(MOTIONS[1:], count, p=_normal([3, 3, 3, 3, 1])).tolist()
        motions[one] = "still"
    elif "like" in plots:
        motions = rng.choice(["still", *ways[1:]], count).tolist()
        motions[one] = motions[one - 1] = ways[0]
    else:
        motions = rng.choice(MOTIONS, count, p=_normal([4, 3, 3, 3, 3, 1])).tolist()
    if "hidden" in plots:
        motions[0] = "still"
        if motions[-1] not in DIRECTIONS:
            motions[-1] = ways[0]
    return motions


def _choose_lifetimes(rng: np.random.Generator, count: int, plots: Collection[str]) -> list[str]:
    lives = rng.choice(["whole", "late", "early", "return"], count, p=[0.82, 0.07, 0.07, 0.04]).tolist()
    order = rng.permutation(count)
    if "first" in plots:
        lives = ["late"] * count
    else:
        for k, plot in zip(order[1:], [p for p in ("late", "early", "return") if p in plots]):
            lives[k] = plot
    lives[order[0]] = "whole"  # the frame is never empty
    if "hidden" in plots:
        lives[0] = lives[-1] = "whole"
    return lives


def _draw_paths(
    rng: np.random.Generator, motion: str, lifetime: str, radius: float, size: tuple[int, int], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidate paths float[M, T, 2] (x, y) of one object, and where it is present: bool[T]."""
    height, width = size
    total, m = num_frames, CANDIDATES
    present = np.ones(total, bool)
    if lifetime == "late":
        present[: max(1, round(rng.uniform(0.22, 0.55) * total))] = False
    elif lifetime == "early":
        present[min(total - 1, round(rng.uniform(0.45, 0.78) * total)) :] = False
    elif lifetime == "return":
        gone = max(1, round(rng.uniform(0.25, 0.4) * total))
        present[gone : min(total - 1, gone + max(1, round(rng.uniform(0.2, 0.35) * total)))] = False
    first, last = np.flatnonzero(present)[[0, -1]]
    low, high = radius + 1, np.array([width, height]) - radius - 2  # centres from which nothing is cut off
    start = rng.uniform(low, high, (m, 1, 2))
    time = (np.arange(total) - first) / max(1, last - first)
    if motion == "still":
        return np.repeat(start, total, axis=1), present
    if motion == "circle":
        swing = 0.19 * min(size)
        middle = rng.uniform(low + swing, high - swing, (m, 1, 2))
        angle = 2 * math.pi * (rng.choice([-1, 1], (m, 1)) * time + rng.random((m, 1)))
        return middle + swing * np.stack([np.cos(angle), np.sin(angle)], -1), present
    axis = 0 if DIRECTIONS[motion][0] else 1
    side, room = (width, height)[axis], high[axis] - low
    travel = rng.uniform(TRAVEL * side, np.maximum(0.62 * side, TRAVEL * side), m).clip(max=room)
    begin = low + rng.random(m) * (room - travel)  # of a movement to the right or down
    if lifetime in ("late", "early") and rng.random() < 0.6:  # through the edge
        present[:] = True
        if lifetime == "late":
            steps, end = np.arange(total) - (first - 1), rng.uniform(0.5 * side, high[axis], m)
            along = -radius - 2 + steps * ((end + radius + 2) / (total - first))[:, None]
        else:
            origin = rng.uniform(low, 0.5 * side, m)
            along = origin[:, None] + np.arange(total) * ((side + radius + 2 - origin) / (last + 1))[:, None]
    else:
        along = begin[:, None] + time * travel[:, None]
    if sum(DIRECTIONS[motion]) < 0:
        along = side - 1 - along
    paths = np.repeat(start, total, axis=1)
    paths[:, :, axis] = along
    return paths, present


def _least_crowded(
    rng: np.random.Generator,
    paths: np.ndarray,
    present: np.ndarray,
    radius: float,
    others: Sequence[SceneObject],
    unit: float,
    cross: SceneObject | None,
) -> int | None:
    """The first candidate path that meets few other objects and, if given, passes over `cross`."""
    if not others:
        return 0
    centers = np.stack([o.centers for o in others])
    reach = 0.85 * (radius + np.array([(len(o.stamp.mask) - 3) / 2 for o in others]))
    both = present & np.stack([o.present for o in others])
    gap = np.linalg.norm(paths[:, None] - centers, axis=-1)  # [M, K, T]
    near = (gap < reach[:, None]) & both
    crowd = near.mean(-1).max(-1)
    limit = 0.35 if rng.random() < 0.4 else 0.0
    if cross is not None:
        at = next(k for k, o in enumerate(others) if o is cross)
        crowd = np.where(gap[:, at].min(-1) < 5 * unit, crowd, 1.0)
        limit = 0.6
    best = int(np.argmax(crowd <= limit)) if (crowd <= limit).any() else int(crowd.argmin())
    return best if crowd[best] <= max(limit, 0.4) else None


def _place(thing: SceneObject, t: int, size: tuple[int, int]) -> tuple[tuple, tuple] | None:
    """Where an object falls on frame t: slices of the frame and of the stamp; None if nowhere."""
    if not thing.present[t]:
        return None
    reach = len(thing.stamp.mask) // 2
    x, y = thing.centers[t].tolist()
    top, left = y - reach, x - reach
    y0, y1, x0, x1 = max(top, 0), min(y + reach + 1, size[0]), max(left, 0), min(x + reach + 1, size[1])
    if y0 >= y1 or x0 >= x1:
        return None
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _measure(size: tuple[int, int], num_frames: int, objects: tuple[SceneObject, ...], seed: int) -> Scene:
    """Counts pixels, frame by frame only where an object is cut off or meets another one."""
    count = len(objects)
    inside = np.array([thing.stamp.area * thing.present for thing in objects])
    reach = np.array([len(thing.stamp.mask) // 2 for thing in objects])
    centers = np.stack([thing.centers for thing in objects])  # [K, T, 2]
    edge = np.array([size[1], size[0]]) - 1 - reach[:, None, None]
    cut = ((centers < reach[:, None, None]) | (centers > edge)).any(-1)
    for k, t in np.argwhere(cut & (inside > 0)).tolist():
        place = _place(objects[k], t, size)
        inside[k, t] = objects[k].stamp.mask[place[1]].sum() if place else 0
    visible, covered = inside.copy(), np.zeros((count, count, num_frames), int)
    gap = np.abs(centers[:, None] - centers).max(-1)  # [K, K, T]
    meet = (gap <= (reach[:, None] + reach)[..., None]) & (inside > 0) & (inside > 0)[:, None]
    for j, t in np.argwhere(_behind(meet)).tolist():
        mine = np.zeros(size, bool)
        frame, patch = _place(objects[j], t, size)  # type: ignore[misc]  # it is inside, hence somewhere
        mine[frame] = objects[j].stamp.mask[patch]
        free = mine.copy()
        for k in range(j + 1, count):
            if meet[k, j, t]:
                frame, patch = _place(objects[k], t, size)  # type: ignore[misc]
                mask = objects[k].stamp.mask[patch]
                covered[k, j, t] = (mine[frame] & mask).sum()
                free[frame] &= ~mask
        visible[j, t] = free.sum()
    return Scene(size, num_frames, objects, seed, inside, visible, covered)


def _behind(meet: np.ndarray) -> np.ndarray:
    """bool[K, T]: the object meets one in front of it."""
    front = np.tri(len(meet), k=-1, dtype=bool)  # first index in front of the second
    return (meet & front[..., None]).any(0)
