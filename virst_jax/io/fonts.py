"""A font that shows a text, whatever its script. What no font here shows is written as code points, not as boxes."""

import functools
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ImageFont

from virst_jax.errors import UserError
from virst_jax.io.atomic import reason
from virst_jax.io.regular import require_file

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
VARIABLE = "VIRST_FONT"  # environment variable: a font file that is tried first
_FOLDERS = (
    "~/.fonts",
    "~/.local/share/fonts",
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
# parts of names of fonts with many scripts, most wanted first
_WANTED = ("cjk", "wqy", "droidsansfallback", "arialuni", "unifont", "msyh", "yugoth", "malgun", "pingfang")
_OTHERS = ("noto", "dejavu")
_STYLES = ("bold", "italic", "oblique", "light", "mono", "math", "condensed")
_MISSING = "\U0010fffe"  # no font has it: it looks as all that a font lacks
_MAX_FONTS = 300


def font_for(texts: Iterable[str], size: int) -> tuple[Font, frozenset[str]]:
    """A font for texts, and the characters that it lacks. Pillow's own where that is enough.

    What is missing is told once on stderr.
    """
    wanted = frozenset(c for text in texts for c in text if not c.isspace())
    best, lacking = ImageFont.load_default(size), wanted
    for path in (None, *_files()):
        try:
            font = ImageFont.load_default(size) if path is None else _opened(path, size)
            lacks = frozenset(c for c in wanted if not _has(font, c))
        except (OSError, ValueError, UserError) as error:
            if path is not None and path == os.environ.get(VARIABLE):
                _tell(f"{VARIABLE}: {path} is no font that can be used ({reason(error)})")
            continue
        if len(lacks) < len(lacking) or path is None:
            best, lacking = font, lacks
        if not lacking:
            break
    if unreadable := sorted(c for c in lacking if not _plain(c)):
        _tell(
            f"no font here shows {''.join(unreadable)[:40]}; the legend has their code points instead (install a font "
            f"such as fonts-noto-cjk, or name a font file in {VARIABLE})"
        )
    return best, lacking


def shown(text: str, lacking: frozenset[str]) -> str:
    """A text with letters without their accents, or code points, for the characters that a font lacks."""
    return "".join(_plain(c) or f"<{ord(c):x}>" if c in lacking else c for c in text)


def _plain(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()


def _has(font: Font, character: str) -> bool:
    if not isinstance(font, ImageFont.FreeTypeFont):
        return character.isascii()
    glyph, none = font.getmask(character), font.getmask(_MISSING)
    return character.isascii() or glyph.size != none.size or bytes(glyph) != bytes(none)


@functools.cache
def _files() -> tuple[str, ...]:
    found: list[Path] = []
    for file in _all_files():
        found.append(file)
        if len(found) == 10 * _MAX_FONTS:
            break

    def rank(path: Path) -> tuple[int, int, str]:
        name = path.name.lower().replace("-", "").replace("_", "")
        wanted = (*_WANTED, *_OTHERS)
        place = next((i for i, part in enumerate(wanted) if part in name), len(wanted))
        return place, any(style in name for style in _STYLES), str(path)

    given = os.environ.get(VARIABLE)
    return (*([given] if given else []), *(str(path) for path in sorted(found, key=rank)[:_MAX_FONTS]))


def _all_files() -> Iterator[Path]:
    for folder in _FOLDERS:
        for where, _, names in os.walk(os.path.expanduser(folder)):
            yield from (Path(where, name) for name in names if name.lower().endswith((".ttf", ".ttc", ".otf")))


def _opened(path: str, size: int) -> Font:
    require_file(path)  # opening a pipe would wait for ever
    return ImageFont.truetype(path, size)


@functools.cache
def _tell(what: str) -> None:
    print(f"note: {what}", file=sys.stderr)
