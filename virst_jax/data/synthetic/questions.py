"""Questions about a synthetic scene with short, regular answers.

kind      question                                          answer
who       which shape is the red shape that leaves?         the red circle; the red circle and the blue square; nothing
color     what color is the star?                           red
shape     what shape is the red one?                        star
motion    how does the red circle move?                     left; in a circle; it stays still
count     how many circles are there?                       2
exists    is there a red circle?                            yes; no
order     does the red circle appear before the star?       yes; no
describe  describe the scene.                               red circle moving left, blue square still

Objects are told from left to right, by their mean place.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from virst_jax.data.synthetic import text
from virst_jax.data.synthetic.scenes import COLORS, DIRECTIONS, SHAPES, SceneObject

Turn = tuple[str, str]
KINDS = ("color", "shape", "motion", "count", "exists", "order", "describe")  # besides "who"
DESCRIBE = "describe the scene."
NOBODY = "nothing"


def ask_who(facts: text.Facts, referral: text.Referral) -> Turn:
    """The question which objects an expression means; an expression that is a question asks it itself."""
    question = referral.text
    if not question.endswith("?"):
        question = f"which {'shapes are' if referral.plural else 'shape is'} {question}?"
    return question, name_all(facts, referral.targets)


def name_all(facts: text.Facts, targets: Iterable[int]) -> str:
    """'the red circle, the blue square and the green star', from left to right."""
    names = [text.name(facts.objects[k]) for k in facts.order if k in set(targets)]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or NOBODY


def describe_targets(facts: text.Facts, targets: Iterable[int]) -> str:
    """'red circle blue square', from left to right; 'nothing'."""
    meant = set(targets)
    things = [facts.objects[k] for k in facts.order if k in meant]
    return " ".join(f"{thing.color} {thing.shape}" for thing in things) or NOBODY


def object_words(thing: SceneObject, is_image: bool) -> tuple[str, ...]:
    """('red', 'circle', 'small', 'striped', 'left'): what a look at a shape tells; for a still image without motion."""
    texture = () if thing.texture == "plain" else (thing.texture,)
    # "in" a circle: the other word is that of a form
    motion = () if is_image else ("in" if thing.motion == "circle" else thing.motion,)
    return thing.color, thing.shape, thing.size, *texture, *motion


def describe(facts: text.Facts) -> str:
    """'red circle moving left, blue square still', from left to right; without motion for an image."""
    words = {**{way: f" moving {way}" for way in DIRECTIONS}, "still": " still", "circle": " moving in a circle"}
    still_image = facts.scene.num_frames == 1
    return ", ".join(
        f"{thing.color} {thing.shape}{'' if still_image else words[thing.motion]}"
        for thing in (facts.objects[k] for k in facts.order)
    )


def questions(facts: text.Facts, kind: str) -> list[Turn]:
    """Every question of a kind of KINDS that has a clear answer."""
    return list(_FINDERS[kind](facts))


def choose_turns(rng: np.random.Generator, facts: text.Facts, referrals: Iterable[text.Referral]) -> list[Turn]:
    """As many questions as there are expressions: half of them ask who is meant, the others are of mixed kinds."""
    turns: list[Turn] = []
    for i, referral in enumerate(referrals):
        turn = ask_who(facts, referral)
        if i % 2:
            pools = [new for kind in KINDS if (new := [t for t in questions(facts, kind) if t not in turns])]
            if pools:
                pool = pools[rng.integers(len(pools))]
                turn = pool[rng.integers(len(pool))]
        turns.append(turn)
    return turns


def _color(facts: text.Facts) -> Iterator[Turn]:
    shapes = [thing.shape for thing in facts.objects]
    for thing in facts.objects:
        if shapes.count(thing.shape) == 1:
            yield f"what color is the {thing.shape}?", thing.color


def _shape(facts: text.Facts) -> Iterator[Turn]:
    colors = [thing.color for thing in facts.objects]
    for thing in facts.objects:
        if colors.count(thing.color) == 1:
            yield f"what shape is the {thing.color} one?", thing.shape


def _motion(facts: text.Facts) -> Iterator[Turn]:
    if facts.scene.num_frames > 1:
        said = {"still": "it stays still", "circle": "in a circle"}
        for thing, way in zip(facts.objects, facts.moves):
            if way is not None:
                yield f"how does {text.name(thing)} move?", said.get(way, way)


def _count(facts: text.Facts) -> Iterator[Turn]:
    things = facts.objects
    yield "how many shapes are there?", str(len(things))
    for thing in things:
        for look in (("", "", thing.color, ""), ("", "", "", thing.shape)):
            number = sum(text.has_look(other, look) for other in things)
            yield f"how many {text.noun(look, plural=True)} are there?", str(number)
    if facts.scene.num_frames > 1 and None not in facts.moves:
        for way in DIRECTIONS:
            yield f"how many shapes move {way}?", str(facts.moves.count(way))


def _exists(facts: text.Facts) -> Iterator[Turn]:
    things = facts.objects
    pairs = {(thing.color, thing.shape) for thing in things}
    for k, (color, shape) in enumerate(sorted(pairs)):
        yield f"is there a {color} {shape}?", "yes"
        other = list(COLORS)[(list(COLORS).index(color) + k + 1) % len(COLORS)], shape
        if k % 2:
            other = color, SHAPES[(SHAPES.index(shape) + k) % len(SHAPES)]
        if other not in pairs:
            yield f"is there a {' '.join(other)}?", "no"


def _order(facts: text.Facts) -> Iterator[Turn]:
    margin = max(1, round(text.TIME_MARGIN * facts.scene.num_frames))
    known = [k for k, appears in enumerate(facts.appears) if appears is not None]
    for a in known:
        for b in known:
            if abs(facts.first[a] - facts.first[b]) >= margin:
                earlier = "yes" if facts.first[a] < facts.first[b] else "no"
                yield f"does {text.name(facts.objects[a])} appear before {text.name(facts.objects[b])}?", earlier


def _describe(facts: text.Facts) -> Iterator[Turn]:
    yield DESCRIBE, describe(facts)


_FINDERS: dict[str, Callable[[text.Facts], Iterator[Turn]]] = {
    "color": _color,
    "shape": _shape,
    "motion": _motion,
    "count": _count,
    "exists": _exists,
    "order": _order,
    "describe": _describe,
}
