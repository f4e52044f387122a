"""Synthetic scenes: exact masks, and expressions that have one reading, which a second reader finds from the pixels."""

import pickle
import re
import sys

import numpy as np
import pytest

from virst_jax.data.synthetic.scenes import COLORS, SHAPES, SIZES, draw_stamp
from virst_jax.data.synthetic.text import CATEGORIES, IMAGE_CATEGORIES
from virst_jax.data.synthetic.videos import SyntheticQuestions, SyntheticVideos
from virst_jax.errors import UserError

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
OPPOSITES = [{"left", "right"}, {"up", "down"}]


class Seen:
    """One object as the pixels show it. Only the shape's name and the texture are taken from the scene."""

    def __init__(self, scene, k, labels, frames):
        thing, masks = scene.objects[k], labels == k + 1
        self.shape, self.texture = thing.shape, thing.texture
        self.area = masks.sum((1, 2))
        best = int(self.area.argmax())
        self.shown = self.area >= 0.25 * self.area[best]
        self.first, self.last = np.flatnonzero(self.shown)[[0, -1]]
        self.away = (~self.shown[self.first : self.last]).sum() >= len(frames) / 8
        off = np.abs(frames[best][masks[best]][:, None].astype(int) - list(COLORS.values())).max(-1)
        self.color = list(COLORS)[(off < 40).sum(0).argmax()]
        places = [np.argwhere(mask)[:, ::-1] for mask in masks]
        span = np.ptp(places[best], axis=0).max() + 1
        self.size = "small" if span < 0.2 * min(scene.size) else "large"
        self.boxes = np.array([(np.min(p, 0) + np.max(p, 0)) / 2 if len(p) else (np.nan, np.nan) for p in places])
        self.masks, self.whole = masks, self.area >= 0.97 * self.area[best]
        self.motion = self._motion(scene.size)

    def _motion(self, size):
        enough = self.whole.sum() > 2  # else parts must do, whose boxes shift when they are covered
        path = self.boxes[self.whole if enough else self.shown]
        span, moved = np.ptp(path, axis=0), path[-1] - path[0]
        if span.max() < (2 if enough else 0.15 * min(size)):
            return "still"
        if span.min() > 0.1 * min(size):
            return "circle"
        along = int(span.argmax())
        return next(w for w, d in DIRECTIONS.items() if d[along] and d[along] == np.sign(moved[along]))


def look(words, thing):
    """Whether 'small striped red circles' fits."""
    singular = {**{s: s for s in SHAPES}, **{s + "s": s for s in SHAPES}, "crosses": "cross"}
    for word in words.split():
        own = singular.get(word)
        if own and own != thing.shape:
            return False
        if not own and word not in ("shape", "shapes", "one") and word not in (thing.size, thing.texture, thing.color):
            return False
    return True


def apart(thing, anchor, word, size):
    both = thing.shown & anchor.shown
    return both.any() and np.nanmean((thing.boxes - anchor.boxes)[both] @ RELATIONS[word]) > 0.09 * min(size)


def moving(text):
    """The motion that a text names."""
    if re.search("still|does not move", text):
        return "still"
    return "circle" if "in a circle" in text else re.search("left|right|up|down", text)[0]


def read(text, things, scene):
    """The positions of the objects that an expression means."""
    total = scene.num_frames
    everything = set(range(len(things)))

    def named(words):
        return next(k for k in everything if look(words, things[k]))

    def only(test):
        return {k for k in everything if test(things[k])}

    if m := re.fullmatch(r"the (.+?) (above|below|left of|right of) the (\w+ \w+)", text):
        anchor = named(m[3])
        fits = {k for k in everything - {anchor} if look(m[1], things[k])}
        return {k for k in fits if apart(things[k], things[anchor], m[2], scene.size)}
    if re.search("appears last", text):
        return only(lambda o: o.first == max(x.first for x in things) and o.first > 0)
    if re.search("there first", text):
        return only(lambda o: o.first == 0)
    if re.search("leaves first|frame first|first to leave", text):
        gone = [o.last for o in things if o.last < total - 1]
        return only(lambda o: bool(gone) and o.last == min(gone))
    if m := re.fullmatch(r"the (.+) that leaves", text):
        return only(lambda o: look(m[1], o) and o.last < total - 1)
    if m := re.fullmatch(r"the (.+) that comes back", text):
        return only(lambda o: look(m[1], o) and o.away)
    if m := re.search("what is the (largest|smallest)", text):
        return only(lambda o: o.size == {"largest": "large", "smallest": "small"}[m[1]])
    if "against the others" in text:
        return {
            k
            for k in everything
            if all({things[k].motion, o.motion} in OPPOSITES for i, o in enumerate(things) if i != k)
        }
    if "while the others move" in text:
        return only(lambda o: o.motion == "still")
    if m := re.fullmatch(r"which shape moves like the (.+)\?", text):
        anchor = named(m[1])
        return {k for k in everything - {anchor} if things[k].motion == things[anchor].motion}
    if m := re.fullmatch(r"which shape is hidden by the (.+)\?", text):
        anchor = named(m[1])
        return {k for k in everything - {anchor} if covers(things[anchor], things[k], scene, k)}
    if m := re.fullmatch(r"which one has a different (color|shape)\?", text):
        values = [getattr(o, m[1]) for o in things]
        return only(lambda o: values.count(getattr(o, m[1])) == 1)
    if re.match("everything ", text):
        return only(lambda o: o.motion == moving(text))
    if m := re.fullmatch(r"(?:the|all) (.+?) (moving .+|that moves .+|that stays? still|that does not move)", text):
        return only(lambda o: look(m[1], o) and o.motion == moving(m[2]))
    if m := re.fullmatch(r"the shape that is (\w+)", text):
        return only(lambda o: o.color == m[1])
    m = re.fullmatch(r"(?:the|all) ((?:\w+ )*\w+)", text)
    return only(lambda o: look(m[1], o))


def covers(front, behind, scene, k):
    """Whether an object takes much of another one's place while that is behind it."""
    full = scene.objects[k]
    for t in np.flatnonzero(front.shown):
        x, y = full.centers[t]
        place = np.zeros(scene.size, bool)
        reach = len(full.stamp.mask) // 2
        if min(x, y) >= reach and x + reach < scene.size[1] and y + reach < scene.size[0] and full.present[t]:
            place[y - reach : y + reach + 1, x - reach : x + reach + 1] = full.stamp.mask
            if (place & front.masks[t]).sum() > 0.5 * place.sum():
                return True
    return False


def check_expressions(source, index):
    """Compares every expression of a sample with what the second reader finds; returns their categories."""
    video, scene = source[index], source.scene(index)
    every = range(video.num_frames)
    labels, frames = scene.labels(every), scene.frames(every)
    things = [Seen(scene, k, labels, frames) for k in range(len(scene.objects))]
    for k, expression in enumerate(video.expressions):
        found = read(expression.text, things, scene)
        union = np.isin(labels, [k + 1 for k in found])
        assert (video.read_masks(k, every) == union).all(), f"{video.name}: {expression.text!r} means {found}"
        if expression.category == "none":
            assert not found
        else:
            assert (len(found) > 1) == (expression.category == "several"), expression.text
        named = [f"{things[j].color} {things[j].shape}" for j in found]
        words = expression.answer.split()
        assert sorted(map(" ".join, zip(words[::2], words[1::2]))) == sorted(named) or (words, named) == (
            ["nothing"],
            [],
        )
    return [expression.category for expression in video.expressions]


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_expression_means_what_the_pixels_say(category):
    source = SyntheticVideos(30, 11, categories=(category,))
    categories = [c for i in range(len(source)) for c in check_expressions(source, i)]
    assert categories.count(category) >= 0.97 * len(categories)  # nearly every scene has all that was asked for


@pytest.mark.parametrize("category", IMAGE_CATEGORIES)
def test_an_expression_of_an_image_means_what_the_pixels_say(category):
    source = SyntheticVideos(30, 12, categories=(category,), is_image=True)
    categories = [c for i in range(len(source)) for c in check_expressions(source, i)]
    assert categories.count(category) >= 0.97 * len(categories)


@pytest.mark.parametrize(
    ("size", "num_frames"), [((96, 160), 16), ((128, 128), 4), ((120, 90), 33), ((48, 64), 8), ((256, 256), 12)]
)
def test_other_sizes_and_lengths(size, num_frames):
    source = SyntheticVideos(12, 5, size=size, num_frames=num_frames, expressions=5)
    for i in range(len(source)):
        video = source[i]
        assert video.size == size
        assert video.num_frames == num_frames
        assert len(video.expressions) == 5
        assert video.read_frames([0, num_frames - 1]).shape == (2, *size, 3)
        check_expressions(source, i)


def test_the_reader_of_these_tests_tells_expressions_apart():
    source = SyntheticVideos(30, 11)
    wrong = total = 0
    for i in range(len(source)):
        scene, texts = source.scene(i), [e.text for e in source[i].expressions]
        other = [e.text for e in source[(i + 1) % len(source)].expressions]
        labels, frames = scene.labels(range(16)), scene.frames(range(16))
        things = [Seen(scene, k, labels, frames) for k in range(len(scene.objects))]
        for mine, foreign in zip(texts, other):
            if not re.search("(of|above|below|like|by) the", foreign):
                wrong += read(mine, things, scene) != read(foreign, things, scene)
                total += 1
    assert wrong > 0.6 * total


def test_same_index_same_sample():
    source, again = SyntheticVideos(10, 3), SyntheticVideos(10, 3)
    video = again[7]
    source[2].read_frames([0])  # what was read before does not matter
    copy = source[7]
    assert copy.name == video.name
    assert copy.expressions == video.expressions
    assert (copy.read_frames([3, 1]) == video.read_frames([1, 3])[::-1]).all()
    assert (copy.read_masks(0, [5]) == video.read_masks(0, range(16))[5]).all()
    assert SyntheticVideos(99, 3)[7].expressions == video.expressions  # nor how many there are
    assert (source[-3].read_frames([0]) == video.read_frames([0])).all()


def test_seeds_and_indices_differ():
    samples = [SyntheticVideos(10, seed)[i] for seed in (0, 1) for i in (0, 1)]
    first = [video.read_frames([0]) for video in samples]
    assert all((a != b).any() for k, a in enumerate(first) for b in first[:k])
    with pytest.raises(IndexError):
        SyntheticVideos(10, 0)[10]


def test_samples_can_be_sent_to_another_process():
    video = SyntheticVideos(4, 3)[1]
    copy = pickle.loads(pickle.dumps(video))
    assert (copy.read_frames([4]) == video.read_frames([4])).all()
    assert (copy.read_masks(1, [4]) == video.read_masks(1, [4])).all()


def test_masks_are_what_is_painted():
    source = SyntheticVideos(10, 2)
    inner = outer = 0
    for i in range(len(source)):
        scene = source.scene(i)
        labels, frames = scene.labels(range(16)), scene.frames(range(16)).astype(int)
        assert [[(f == k + 1).sum() for f in labels] for k in range(len(scene.objects))] == scene.visible.tolist()
        for k, thing in enumerate(scene.objects):
            if thing.texture == "plain":
                far = np.abs(frames - COLORS[thing.color]).max(-1)
                inner += (far[labels == k + 1] > 60).sum()
                # beyond the antialiased edge no pixel has the colour, unless another object shares it
                if [other.color for other in scene.objects].count(thing.color) == 1:
                    outer += (far[labels == 0] < 25).sum()
        assert np.abs(frames[labels == 0] - scene.background[None].repeat(16, 0)[labels == 0]).mean() < 1
    painted = sum(source.scene(i).visible.sum() for i in range(len(source)))
    assert inner < 0.08 * painted  # of the edge, where colours mix
    assert outer < 0.005 * painted


def test_scenes_are_as_described():
    source = SyntheticVideos(150, 4)
    shared = motions = hidden = total = 0
    for i in range(len(source)):
        scene = source.scene(i)
        things = scene.objects
        pairs = [(o.color, o.shape) for o in things]
        assert 2 <= len(things) <= 5
        assert len(set(pairs)) == len(pairs)
        shared += len({c for c, _ in pairs}) < len(pairs) or len({s for _, s in pairs}) < len(pairs)
        for o, visible in zip(things, scene.visible):
            seen = o.centers[visible > 0]
            spans = np.ptp(seen, axis=0)
            assert (spans.max() == 0) if o.motion == "still" else spans.max() >= 128 / 3
            motions += o.motion != "still"
        gone = (scene.visible == 0) & (scene.inside > 0)
        assert gone.mean() < 0.3
        hidden += gone.sum()
        total += (scene.inside > 0).sum()
    assert shared > 100
    assert motions > 200
    assert hidden < 0.02 * total


def test_colors_and_sizes_are_far_apart():
    colors = np.array(list(COLORS.values()))
    gaps = np.abs(colors[:, None] - colors).max(-1) + 999 * np.eye(len(colors))
    assert gaps.min() > 120
    assert SIZES["large"][0] > 1.5 * SIZES["small"][1]


@pytest.mark.parametrize("shape", SHAPES)
def test_drawing_agrees_with_geometry(shape):
    small, large = (draw_stamp(shape, "red", "plain", r) for r in (9.0, 36.0))
    assert large.area / small.area == pytest.approx(16, rel=0.1)
    assert (large.mask == large.mask[:, ::-1]).all()
    r = 36.0
    areas = {
        "circle": np.pi * r**2,
        "square": (1.7 * r) ** 2,
        "ring": np.pi * r**2 * (1 - 0.44**2),
        "cross": 4 * (2 * 0.32 * r * r - (0.32 * r) ** 2),
        "triangle": 3 * np.sqrt(3) * (0.55 * r) ** 2,
        "star": 5 * 0.48 * r * r * np.sin(np.pi / 5),
    }
    assert large.area == pytest.approx(areas[shape], rel=0.02)


def test_expressions_are_mixed_and_of_different_targets():
    source = SyntheticVideos(120, 8, expressions=6)
    videos = [source[i] for i in range(len(source))]
    categories = [e.category for v in videos for e in v.expressions]
    assert set(categories) == set(CATEGORIES)
    assert all(categories.count(c) > 20 for c in CATEGORIES)
    assert np.mean([len({e.text for e in v.expressions}) for v in videos]) > 5.9
    assert all([e.id for e in v.expressions] == list("012345") for v in videos)
    targets = [len({v.read_masks(k, range(0, 16, 3)).tobytes() for k in range(6)}) for v in videos]
    assert np.mean(targets) > 3
    words = {word for v in videos for e in v.expressions for word in re.findall(r"\w+", e.text)}
    assert len(words) < 90


def test_weights_choose_the_categories():
    source = SyntheticVideos(60, 8, categories={"motion": 3, "none": 1, "time": 0})
    categories = [e.category for i in range(60) for e in source[i].expressions]
    assert set(categories) == {"motion", "none"}
    assert 0.6 < categories.count("motion") / len(categories) < 0.9


def test_images_have_one_frame_and_no_time():
    source = SyntheticVideos(40, 6, is_image=True)
    for i in range(40):
        image = source[i]
        assert image.is_image
        assert image.num_frames == 1
        assert image.read_frames([0]).shape == (1, 128, 128, 3)
        assert not re.search("mov|still|leave|appear|back|first", " ".join(e.text for e in image.expressions))


def test_questions_are_answered_from_the_scene():
    source = SyntheticQuestions(60, 9, expressions=6)
    kinds = set()
    for i in range(len(source)):
        question, scene = source[i], source.scene(i)
        assert len(question.turns) == 6
        names = {f"the {o.color} {o.shape}": o for o in scene.objects}
        labels, frames = scene.labels(range(16)), scene.frames(range(16))
        things = [Seen(scene, k, labels, frames) for k in range(len(scene.objects))]
        for text, answer in question.turns:
            if m := re.fullmatch(r"what color is the (\w+)\?", text):
                assert [answer] == [o.color for o in things if o.shape == m[1]]
            elif m := re.fullmatch(r"what shape is the (\w+) one\?", text):
                assert [answer] == [o.shape for o in things if o.color == m[1]]
            elif m := re.fullmatch(r"how does (.+) move\?", text):
                said = {"still": "it stays still", "circle": "in a circle"}
                assert answer == said.get(names[m[1]].motion, names[m[1]].motion)
            elif m := re.fullmatch(r"how many shapes move (\w+)\?", text):
                assert int(answer) == sum(o.motion == m[1] for o in scene.objects)
            elif m := re.fullmatch(r"how many (.+) are there\?", text):
                assert int(answer) == sum(look(m[1], o) for o in things)
            elif m := re.fullmatch(r"is there a (.+)\?", text):
                assert answer == ("yes" if f"the {m[1]}" in names else "no")
            elif m := re.fullmatch(r"does the (.+) appear before the (.+)\?", text):
                a, b = (next(o for o in things if look(words, o)) for words in m.groups())
                assert answer == ("yes" if a.first < b.first else "no")
            elif text == "describe the scene.":
                assert len(answer.split(", ")) == len(things)
                assert {part.split()[0] + " " + part.split()[1] for part in answer.split(", ")} == {
                    name[4:] for name in names
                }
            else:
                m = re.fullmatch(r"which shapes? (?:is|are) ((?:the|all|everything) .+)\?", text)
                found = read(m[1] if m else text, things, scene)
                who = set(re.split(", | and ", answer)) - {"nothing"}
                assert who == {f"the {things[k].color} {things[k].shape}" for k in found}, text
                kinds.add("who" if found else "nobody")
                continue
            kinds.add(text.split()[1])
    assert kinds >= {"who", "nobody", "color", "shape", "does", "many", "there", "the"}


def test_questions_are_about_the_same_scenes():
    videos, questions = SyntheticVideos(5, 1), SyntheticQuestions(5, 1)
    assert (videos[3].read_frames([2]) == questions[3].read_frames([2])).all()


def test_a_sample_is_drawn_by_arrays():
    source = SyntheticVideos(50, 1)
    source[0].read_frames([0])
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        for i in range(1, 40):
            video = source[i]
            video.read_frames(range(8))
            for k in range(4):
                video.read_masks(k, range(8))
    finally:
        sys.settrace(before)
    # a loop over the pixels of one frame of the eight would alone execute more lines than a whole sample may
    assert 0 < lines / 39 < 128 * 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_videos": 0}, "num_videos"),
        ({"seed": -1}, "seed"),
        ({"size": (16, 128)}, "height"),
        ({"num_frames": 2}, "num_frames"),
        ({"expressions": 0}, "expressions"),
        ({"categories": ("colour",)}, "colour"),
        ({"categories": ("motion",), "is_image": True}, "motion"),
        ({"categories": {"motion": 0}}, "no category has a weight"),
        ({"categories": {"motion": -1.0}}, "negative"),
        ({"categories": ()}, "no category has a weight"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message) as error:
        SyntheticVideos(**{"num_videos": 4, "seed": 0, **settings})
    assert "\n" not in str(error.value)
