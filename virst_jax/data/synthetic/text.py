"""Expressions about a synthetic scene, each with exactly one reading.

A statement is true, false or unclear (None) of each object; an expression is only used where it is unclear of none,
so what it means holds by a margin.

category    what the sentence holds                               it is true of an object when
appearance  colour, shape, size, texture                          it has every one that is said
motion      still, left, right, up, down, in a circle             it was made to move so, and is seen to
relation    above, below, left of, right of a named shape         RELATION_MARGIN apart on (nearly) all common frames
time        appears last, is there first, leaves, comes back      TIME_MARGIN away from all others
reasoning   a question: what leaves first, is largest, moves      only one object is so
            against or like others, rests, is hidden, is odd
several     all of a colour, shape, size, texture or motion       two or more objects are so
none        any of the above but reasoning                        no object is so

To leave is to be gone at the end, through the edge or by vanishing; to come back is to be gone in between. Images
have the categories without motion and time: IMAGE_CATEGORIES.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from virst_jax.data.synthetic.scenes import COLORS, DIRECTIONS, MOTIONS, OPPOSITE, SHAPES, Scene, SceneObject

CATEGORIES = ("appearance", "motion", "relation", "time", "reasoning", "several", "none")
IMAGE_CATEGORIES = ("appearance", "relation", "several", "none")
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
RELATION_MARGIN = 0.15  # of the frame's shorter side; below a fifth of it a relation is false
TIME_MARGIN = 1 / 8  # of the video

# "moving", "that moves": how a motion is said of one object, and of several
MOTION_WORDS = {
    **{way: (f"moving {way}", f"that moves {way}") for way in DIRECTIONS},
    "still": ("that stays still", "that does not move"),
    "circle": ("moving in a circle", "that moves in a circle"),
}

Truth = list[bool | None]  # of each object
Look = tuple[str, str, str, str]  # size, texture, colour, shape; empty: not said


@dataclass(frozen=True)
class Referral:
    """An expression and the objects that it means."""

    text: str
    targets: tuple[int, ...]  # positions in Scene.objects, ascending
    kind: str  # of wording, within its category
    plural: bool = False  # worded of several, whether there are any or not


@dataclass(frozen=True, eq=False)
class Facts:
    """What happens in a scene, in the terms of the expressions."""

    scene: Scene
    shown: np.ndarray  # bool[K, T]: at least a quarter of it is seen
    first: np.ndarray  # int[K], frame on which it appears
    end: np.ndarray  # int[K], frame after its last one
    appears: Truth  # later than the video starts
    leaves: Truth  # for good
    returns: Truth
    moves: list[str | None]  # as MOTIONS; None: too little of it is seen
    order: list[int]  # objects from left to right

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return self.scene.objects

    @functools.cached_property
    def shared_looks(self) -> list[tuple[Look, Truth]]:
        """The shapes and colours that more than one object has."""
        looks: list[Look] = [("", "", "", shape) for shape in SHAPES] + [("", "", color, "") for color in COLORS]
        truths = [(look, _look_truth(self, look)) for look in looks]
        return [(look, truth) for look, truth in truths if truth.count(True) > 1]

    @functools.cached_property
    def relations(self) -> dict[str, list[Truth]]:
        """Word and anchor -> of which objects it is true that they are above, below, ... the anchor."""
        together = self.shown[:, None] & self.shown  # [anchor, object, T]
        frames = together.sum(-1)
        enough = frames >= max(1, 0.3 * self.shown.shape[1])
        centers = np.stack([thing.centers for thing in self.objects]) / min(self.scene.size)
        offset = centers - centers[:, None]
        result: dict[str, list[Truth]] = {}
        for word, (x, y) in RELATIONS.items():
            apart = x * offset[..., 0] + y * offset[..., 1]
            least = 0.95 * frames
            yes = enough & (((apart >= RELATION_MARGIN) & together).sum(-1) >= least)
            no = enough & (((apart <= RELATION_MARGIN / 5) & together).sum(-1) >= least)
            np.fill_diagonal(no, True)  # never of itself
            result[word] = [
                [True if y else False if n else None for y, n in zip(*rows)] for rows in zip(yes.tolist(), no.tolist())
            ]
        return result


def find_facts(scene: Scene) -> Facts:
    """Measures a scene once for all expressions."""
    total, count = scene.num_frames, len(scene.objects)
    area = np.array([thing.stamp.area for thing in scene.objects])[:, None]
    inside, shown = scene.inside >= 0.25 * area, scene.visible >= 0.25 * area
    first, end = inside.argmax(1), total - inside[:, ::-1].argmax(1)
    # an object that others hide when it comes or goes leaves open when that is
    start_clear = np.abs(shown.argmax(1) - first) <= 1
    end_clear = np.abs(total - shown[:, ::-1].argmax(1) - end) <= 1
    margin = _time_margin(total)
    between = [slice(int(first[k]), int(end[k])) for k in range(count)]
    gaps = [int((~inside[k, between[k]]).sum()) for k in range(count)]
    unseen = [int((~shown[k, between[k]]).sum()) for k in range(count)]  # vanished, or hidden for as long
    returns = [(_apart(gap, margin) if gap else False if no < margin else None) for gap, no in zip(gaps, unseen)]
    appears = [_apart(int(first[k]), margin) if start_clear[k] else None for k in range(count)]
    leaves = [_apart(total - int(end[k]), margin) if end_clear[k] and not gaps[k] else None for k in range(count)]
    moves = [_seen_motion(scene, k, shown[k]) for k in range(count)]
    # where an object is seen; its mean place orders the objects in answers
    places = [scene.objects[k].centers[shown[k], 0].mean() for k in range(count)]
    order = sorted(range(count), key=lambda k: places[k])
    return Facts(scene, shown, first, end, appears, leaves, returns, moves, order)


def candidates(facts: Facts, category: str) -> list[Referral]:
    """Every expression of a category that is clear in a scene."""
    return list(_FINDERS[category](facts))


def name(thing: SceneObject) -> str:
    """The name of an object, unique in its scene: 'the red circle'."""
    return f"the {thing.color} {thing.shape}"


def noun(look: Look, plural: bool = False) -> str:
    """'small striped red circle', or 'shapes'."""
    head = look[3] or "shape"
    return " ".join([*filter(None, look[:3]), (head + ("es" if head == "cross" else "s")) if plural else head])


def has_look(thing: SceneObject, look: Look) -> bool:
    """Whether an object has every attribute that is said."""
    size, texture, color, shape = look
    return (
        color in ("", thing.color)
        and shape in ("", thing.shape)
        and size in ("", thing.size)
        and texture in ("", thing.texture)
    )


def relation(facts: Facts, anchor: int, word: str) -> Truth:
    """Which objects are above, below, ... another one; it is so of itself never."""
    return facts.relations[word][anchor]


def motion(facts: Facts, word: str) -> Truth:
    """Which objects move in a way of MOTIONS."""
    return [None if seen is None else seen == word for seen in facts.moves]


def latest(facts: Facts) -> Truth:
    """Which object appears after all others."""
    return _extreme([int(x) for x in facts.first], facts.appears, _time_margin(facts.scene.num_frames))


def earliest_gone(facts: Facts) -> Truth:
    """Which object is the first to leave."""
    return _extreme([-int(x) for x in facts.end], facts.leaves, _time_margin(facts.scene.num_frames))


def hidden_by(facts: Facts, front: int) -> Truth:
    """Which objects another one covers for a while: two thirds of them, on at least one frame."""
    truth: Truth = []
    for k, thing in enumerate(facts.objects):
        most = facts.scene.covered[front, k].max() / thing.stamp.area
        truth.append(True if most >= 0.65 else False if most <= 0.2 else None)
    return truth


def both(*truths: Sequence[bool | None]) -> Truth:
    """All of some statements, object by object: false where one is, else unclear where one is."""
    return [False if False in row else None if None in row else True for row in zip(*truths)]


def meant(truth: Truth) -> tuple[int, ...] | None:
    """The objects of which a statement is true; None if it is unclear of one."""
    return None if None in truth else tuple(k for k, yes in enumerate(truth) if yes)


def _look_truth(facts: Facts, look: Look) -> Truth:
    return [has_look(thing, look) for thing in facts.objects]


def _time_margin(num_frames: int) -> int:
    return max(1, round(TIME_MARGIN * num_frames))


def _apart(frames: int, margin: int) -> bool | None:
    return True if frames >= margin else False if frames == 0 else None


def _seen_motion(scene: Scene, k: int, shown: np.ndarray) -> str | None:
    thing = scene.objects[k]
    if shown.sum() < min(3, scene.num_frames):
        return None
    span = np.ptp(thing.centers[shown], axis=0) / np.array(scene.size)[::-1]
    return thing.motion if thing.motion == "still" or span.max() >= 0.25 else None


def _extreme(when: list[int], of: Truth, margin: int) -> Truth:
    """The object with the largest `when` among those of which `of` is true, if by a margin."""
    known = [k for k, yes in enumerate(of) if yes]
    if None in of or not known:
        return [None if None in of else False] * len(of)
    best = max(known, key=lambda k: when[k])
    clear = all(when[best] - when[k] >= margin for k in known if k != best)
    return [k == best if clear else None for k in range(len(of))]


def _one(truth: Truth, kind: str, *texts: str) -> Iterator[Referral]:
    targets = meant(truth)
    if targets is not None and len(targets) == 1:
        yield from (Referral(text, targets, kind) for text in texts)


def _appearance(facts: Facts) -> Iterator[Referral]:
    for thing in facts.objects:
        full: Look = (thing.size, thing.texture if thing.texture != "plain" else "", thing.color, thing.shape)
        unique: list[tuple[int, ...]] = []  # the sets of attributes that single it out, as far as no smaller one does
        for number in range(1, 5):
            for said in itertools.combinations([i for i in range(4) if full[i]], number):
                if any(set(u) <= set(said) for u in unique):
                    continue
                look: Look = (
                    full[0] if 0 in said else "",
                    full[1] if 1 in said else "",
                    full[2] if 2 in said else "",
                    full[3] if 3 in said else "",
                )
                truth = _look_truth(facts, look)
                if truth.count(True) == 1:
                    unique.append(said)
                    yield from _one(truth, f"{number} words", f"the {noun(look)}")
                    if said == (2,):
                        yield from _one(truth, "that is", f"the shape that is {thing.color}")
        truth = [other is thing for other in facts.objects]
        yield from _one(truth, "name", name(thing))


def _narrowed(facts: Facts, truth: Truth) -> Iterator[tuple[Look, Truth]]:
    """Nouns for a statement: any shape, or one of a colour or shape that more than one object has."""
    yield ("", "", "", ""), truth
    if True in truth:
        for look, own in facts.shared_looks:
            yield look, both(own, truth)


def _motion(facts: Facts) -> Iterator[Referral]:
    for word in MOTIONS:
        for look, truth in _narrowed(facts, motion(facts, word)):
            kind = "any" if not any(look) else "narrow"
            yield from _one(truth, kind, *(f"the {noun(look)} {text}" for text in MOTION_WORDS[word]))


def _relation(facts: Facts) -> Iterator[Referral]:
    for anchor, thing in enumerate(facts.objects):
        for word in RELATIONS:
            for look, truth in _narrowed(facts, relation(facts, anchor, word)):
                yield from _one(truth, word, f"the {noun(look)} {word} {name(thing)}")


def _time(facts: Facts) -> Iterator[Referral]:
    yield from _one(latest(facts), "last", "the shape that appears last", "the one that appears last")
    # there first: all others appear later
    if None not in facts.appears and None not in facts.returns:
        first: Truth = [not yes for yes in facts.appears]
        yield from _one(first, "first", "the shape that is there first", "the one that is there first")
    for look, truth in _narrowed(facts, facts.leaves):
        yield from _one(truth, "leaves", f"the {noun(look)} that leaves")
    yield from _one(earliest_gone(facts), "leaves first", "the shape that leaves first")
    for look, truth in _narrowed(facts, facts.returns):
        yield from _one(truth, "returns", f"the {noun(look)} that comes back")


def _reasoning(facts: Facts) -> Iterator[Referral]:
    things, count = facts.objects, len(facts.objects)
    yield from _one(
        earliest_gone(facts), "leave", "what will leave the frame first?", "which shape is the first to leave?"
    )
    for size, word in (("large", "largest"), ("small", "smallest")):
        yield from _one([thing.size == size for thing in things], word, f"what is the {word} thing here?")
    moves = facts.moves
    if None not in moves:
        ways = [str(way) for way in moves]
        for way in DIRECTIONS:
            if ways.count(way) == 1 and ways.count(OPPOSITE[way]) == count - 1 >= 2:
                yield from _one(motion(facts, way), "against", "which one moves against the others?")
        if ways.count("still") == 1 and count >= 3:
            yield from _one(motion(facts, "still"), "rest", "which one stays still while the others move?")
    for k, thing in enumerate(things):
        if moves[k] not in (None, "still"):
            like = both(motion(facts, str(moves[k])), [other is not thing for other in things])
            yield from _one(like, "like", f"which shape moves like {name(thing)}?")
        yield from _one(hidden_by(facts, k), "hidden", f"which shape is hidden by {name(thing)}?")
    for word, values in (("color", [o.color for o in things]), ("shape", [o.shape for o in things])):
        alone = [values.count(value) == 1 for value in values]
        if count >= 3 and len(set(values)) == 2 and sum(alone) == 1:
            yield from _one(list(alone), "odd", f"which one has a different {word}?")


def _groups(facts: Facts) -> Iterator[tuple[str, Truth, tuple[str, ...]]]:
    """Statements that may be true of several objects, or of none: kind, truth, wordings."""
    looks: list[Look] = [("", "", color, "") for color in COLORS]
    looks += [("", "", "", shape) for shape in SHAPES]
    looks += [(size, "", "", "") for size in ("small", "large")]
    looks += [("", texture, "", "") for texture in ("striped", "dotted")]
    for look in looks:
        kind = next(kind for kind, said in zip(("size", "texture", "color", "shape"), look) if said)
        many = noun(look, plural=True)
        yield kind, _look_truth(facts, look), (f"all {many}", f"the {many}")
    if facts.scene.num_frames > 1:
        for word in MOTIONS:
            one, that = MOTION_WORDS[word]
            texts = (f"all shapes {one}", f"everything {that}") if one != that and word != "still" else ()
            yield "motion", motion(facts, word), texts or ("all shapes that stay still", f"everything {one}")


def _several(facts: Facts) -> Iterator[Referral]:
    for kind, truth, texts in _groups(facts):
        targets = meant(truth)
        if targets is not None and len(targets) > 1:
            yield from (Referral(text, targets, kind, plural=True) for text in texts)


def _none(facts: Facts) -> Iterator[Referral]:
    things = facts.objects
    colors, shapes = {thing.color for thing in things}, {thing.shape for thing in things}
    for color in COLORS:
        for shape in SHAPES:
            near = (color in colors) + (shape in shapes)
            if not any(has_look(thing, ("", "", color, shape)) for thing in things):
                kind = ("far", "half", "near")[near]
                yield Referral(f"the {color} {shape}", (), kind)
    for kind, truth, texts in _groups(facts):
        if meant(truth) == ():
            yield from (Referral(text, (), f"all {kind}", plural=True) for text in texts)
    for anchor, thing in enumerate(things):
        for word in RELATIONS:
            if meant(relation(facts, anchor, word)) == ():
                yield Referral(f"the shape {word} {name(thing)}", (), "relation")
    if facts.scene.num_frames > 1:
        for word in MOTIONS:
            if meant(motion(facts, word)) == ():
                yield from (Referral(f"the shape {text}", (), "motion") for text in MOTION_WORDS[word])
        if meant(facts.leaves) == ():
            yield Referral("the shape that leaves", (), "time")
        if meant(facts.returns) == ():
            yield Referral("the shape that comes back", (), "time")


_FINDERS: dict[str, Callable[[Facts], Iterator[Referral]]] = {
    "appearance": _appearance,
    "motion": _motion,
    "relation": _relation,
    "time": _time,
    "reasoning": _reasoning,
    "several": _several,
    "none": _none,
}
