"""Synthetic referring video segmentation: as many videos and questions as wanted, with exact masks.

`SyntheticVideos` gives videos of moving shapes with expressions (scenes.py, text.py),
`SyntheticQuestions` the same videos with questions (synthetic_questions.py). A sample depends on the seed, its index
and the settings only; pixels are drawn when they are read. On one core a video of 128 x 128 pixels takes a few
milliseconds with eight frames and the masks of four expressions.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from virst_jax.data.samples import Expression, Question, Video
from virst_jax.data.synthetic.questions import choose_turns, describe_targets, object_words
from virst_jax.data.synthetic.scenes import Scene, make_scene
from virst_jax.data.synthetic.text import CATEGORIES, IMAGE_CATEGORIES, Facts, Referral, candidates, find_facts
from virst_jax.errors import UserError

WEIGHTS: dict[str, float] = {
    "appearance": 3,
    "motion": 3,
    "relation": 2,
    "time": 2,
    "reasoning": 2,
    "several": 1.5,
    "none": 1,
}
# what makes a category possible; the others are possible in nearly every scene
PLOTS: dict[str, tuple[str, ...]] = {
    "time": ("late", "early", "return", "first"),
    "reasoning": ("early", "against", "rest", "like", "odd", "extreme", "hidden"),
}
TRIES = 25  # scenes, before other categories fill in for one that is not possible

Categories = Sequence[str] | Mapping[str, float] | None


class _Synthetic:
    """Scenes with their expressions, by index."""

    def __init__(
        self,
        num_videos: int,
        seed: int,
        *,
        size: Sequence[int] = (128, 128),
        num_frames: int = 16,
        expressions: int = 4,
        categories: Categories = None,
        is_image: bool = False,
    ):
        """Settings of a data set.

        Args:
          num_videos: samples.
          seed: of the data set; another seed gives other scenes.
          size: height and width, pixels; everything scales with the shorter side.
          num_frames: of a video; an image has one.
          expressions: of a sample, or questions.
          categories: names of text.CATEGORIES, or their weights; None: WEIGHTS, as far as possible.
          is_image: still images; without the categories that need time.

        Raises:
          UserError: a setting is out of range, or a category is unknown or not possible in an image.
        """
        for what, value, least in (
            ("num_videos", num_videos, 1),
            ("seed", seed, 0),
            ("num_frames", num_frames, 1 if is_image else 4),
            ("expressions", expressions, 1),
            ("height", size[0], 32),
            ("width", size[1], 32),
        ):
            if value < least:
                raise UserError(f"synthetic data: {what} is {value}; it must be at least {least}")
        self.num_videos, self.seed, self.size = num_videos, seed, (int(size[0]), int(size[1]))
        self.num_frames, self.expressions, self.is_image = 1 if is_image else num_frames, expressions, is_image
        self.weights = _weights(categories, is_image)

    def __len__(self) -> int:
        return self.num_videos

    def scene(self, index: int) -> Scene:
        """The scene of a sample, with all that is known of it.

        Raises:
          IndexError: no such sample.
        """
        return self._draw(index)[0].scene

    def _draw(self, index: int) -> tuple[Facts, list[tuple[str, Referral]], np.random.Generator]:
        """A scene, its expressions with their categories, and the generator for what is left to choose."""
        index = range(self.num_videos)[index]  # counts from the end, or raises IndexError
        rng = np.random.default_rng([self.seed, index])
        names, weights = list(self.weights), np.array(list(self.weights.values()))
        wanted = rng.choice(names, self.expressions, p=weights / weights.sum()).tolist()
        best: tuple[int, Facts, dict[str, list[Referral]]] | None = None
        tries = 0
        while best is None or (best[0] and tries < TRIES):
            tries += 1
            plots = [str(rng.choice(PLOTS[c])) for c in sorted(set(wanted) & set(PLOTS))]
            scene = make_scene(rng, self.size, self.num_frames, plots)
            if scene is None:
                continue
            facts = find_facts(scene)
            pools = {category: candidates(facts, category) for category in sorted(set(wanted))}
            missing = sum(not pools[category] for category in wanted)
            if missing < (self.expressions if best is None else best[0]):
                best = missing, facts, pools
        _, facts, pools = best
        return facts, _choose(rng, wanted, pools), rng


class SyntheticVideos(_Synthetic):
    """Synthetic videos or images with expressions, a `Source`."""

    def __getitem__(self, index: int) -> Video:
        facts, chosen, _ = self._draw(index)
        scene = facts.scene
        return Video(
            name=f"synthetic_{self.seed}_{range(self.num_videos)[index]:06d}",
            num_frames=scene.num_frames,
            size=scene.size,
            expressions=tuple(
                Expression(r.text, str(i), category, describe_targets(facts, r.targets))
                for i, (category, r) in enumerate(chosen)
            ),
            read_frames=scene.frames,
            read_masks=functools.partial(_read_masks, scene, tuple(r.targets for _, r in chosen)),
            is_image=self.is_image,
            read_objects=scene.labels,
            objects=tuple(object_words(thing, self.is_image) for thing in scene.objects),
        )


class SyntheticQuestions(_Synthetic):
    """The same videos or images with questions, a `Source`; each turn stands for itself."""

    def __getitem__(self, index: int) -> Question:
        facts, chosen, rng = self._draw(index)
        return Question(
            name=f"synthetic_{self.seed}_{range(self.num_videos)[index]:06d}",
            num_frames=facts.scene.num_frames,
            turns=tuple(choose_turns(rng, facts, [referral for _, referral in chosen])),
            read_frames=facts.scene.frames,
            is_image=self.is_image,
        )


def _weights(categories: Categories, is_image: bool) -> dict[str, float]:
    possible = IMAGE_CATEGORIES if is_image else CATEGORIES
    if categories is None:
        return {name: WEIGHTS[name] for name in possible}
    weights = dict(categories) if isinstance(categories, Mapping) else dict.fromkeys(categories, 1.0)
    for name, weight in weights.items():
        if name not in possible:
            kind = "images" if is_image else "videos"
            raise UserError(f"synthetic data: no category {name!r} in {kind}; choose of {', '.join(possible)}")
        if not weight >= 0:
            raise UserError(f"synthetic data: the weight of category {name!r} is {weight}; it must not be negative")
    if not sum(weights.values()):
        raise UserError("synthetic data: no category has a weight; name at least one")
    return {name: float(weight) for name, weight in weights.items() if weight}


def _choose(
    rng: np.random.Generator, wanted: Sequence[str], pools: dict[str, list[Referral]]
) -> list[tuple[str, Referral]]:
    """One expression for each wanted category: new words, new targets, and kinds of wording in equal shares."""
    chosen: list[tuple[str, Referral]] = []
    texts: set[str] = set()
    uses: Counter[tuple[int, ...]] = Counter()
    for category in wanted:
        new = {name: [r for r in pool if r.text not in texts] for name, pool in pools.items()}
        if not new[category]:  # not possible here, or all said
            category = str(rng.choice([name for name in pools if new[name]] or [name for name in pools if pools[name]]))
        pool = new[category] or pools[category]
        fewest = min(uses[r.targets] for r in pool)
        pool = [r for r in pool if uses[r.targets] == fewest]
        kind = rng.choice(sorted({r.kind for r in pool}))
        pool = [r for r in pool if r.kind == kind]
        referral = pool[rng.integers(len(pool))]
        chosen.append((category, referral))
        texts.add(referral.text)
        uses[referral.targets] += 1
    return chosen


def _read_masks(
    scene: Scene, targets: Sequence[tuple[int, ...]], expression: int, indices: Sequence[int]
) -> np.ndarray:
    return scene.masks(targets[expression], indices)
