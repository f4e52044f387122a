"""The small model of this package and its sample clip: where they lie, and what has to be said of them."""

import os
from pathlib import Path

EMBEDDED = {"tiny": Path(__file__).parents[1] / "assets" / "tiny"}
SMALL = "tiny"
NOTE = (
    'the model "tiny" of this package is a demonstration: it was trained on moving coloured shapes and knows nothing '
    "of the real world; give another one with --model (see the README on converting the released checkpoints)"
)
NO_ANSWERS = f"it cannot answer questions: {NOTE}"
# a sample clip that data.synthetic made, 32 frames of 256 x 256 pixels, 8 a second, and what to ask of it
CLIP = Path(__file__).parents[1] / "assets" / "demo.mp4"
EXPRESSIONS = (
    "the cyan cross",  # how it looks
    "the shape that stays still",  # how it moves
    "the one that appears last",  # when it is there
    "what will leave the frame first?",  # a question
    "the cyan shapes",  # several
    "the green circle",  # nothing: there is none
)
_DIGESTS = "digests.json"  # of all its parameters, so a copy elsewhere is recognized


def is_small(model: str | os.PathLike[str]) -> bool:
    """Whether a name or a folder means the small model of this package, or a copy of it."""
    name = os.fspath(model)
    if name in EMBEDDED and not os.path.lexists(name):
        return True
    file = Path(name, _DIGESTS)
    return file.is_file() and file.read_bytes() == (EMBEDDED[SMALL] / _DIGESTS).read_bytes()
