"""Names that come from files: of videos, expressions and frames in a data set's JSON, of entries in an archive.

Such a name becomes a path, when a frame is read and when a mask is written. This is the one check that it stays below
the folder that it is joined to, and that a file system can hold it.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePath

from virst_jax.errors import UserError, kind_of, printable

MAX_BYTES = 240  # of a part between slashes, in UTF-8; file systems hold 255, a suffix needs some
MAX_PATH_BYTES = 1000
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}  # of Windows


def name_fault(name: object, *, nested: bool = False) -> str:
    """What is wrong with a name as the name of a file; empty if nothing is.

    Args:
      nested: the name may hold slashes, which stand for folders.
    """
    if not isinstance(name, str):
        return f"is {kind_of(name)}, not text"
    if not name:
        return "is empty"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        return "holds a control character or half of a character"
    if "\\" in name:
        return "holds a backslash; folders are separated by /"
    if "/" in name and not nested:
        return "holds a slash, so it would lead to another folder"
    if len(name.encode()) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "leads out of its folder" if part == ".." or name.startswith("/") else f"has the part {part!r}"
        if len(part.encode()) > MAX_BYTES:
            return f"has a part of more than {MAX_BYTES} bytes"
        if re.match(r"[A-Za-z]:", part):
            return "starts with the letter of a drive"
        if part.split(".")[0].strip().lower() in _DEVICES:
            return f"has the part {part!r}, the name of a device on Windows"
    return ""


def check_name(name: object, what: str, *, nested: bool = False) -> str:
    """A name that may be joined to a folder.

    Args:
      what: where it stands and what it names, such as "meta.json: the video".
      nested: as in `name_fault`.

    Raises:
      UserError: it is no such name.
    """
    fault = name_fault(name, nested=nested)
    if fault:
        raise UserError(f"{what}{shown(name)} {fault}; rename it")
    assert isinstance(name, str)
    return name


def shown(name: object) -> str:
    """A name as messages show it, with a space before it; nothing for what is no text."""
    return f" '{printable(name[:80])}{'...' if len(name) > 80 else ''}'" if isinstance(name, str) else ""


def natural_key(name: str) -> tuple[str, ...]:
    """Sorts names as people count: "frame_2" before "frame_10", whatever other numbers stand before them."""
    parts = re.split(r"([0-9]+)", name)
    # Text and numbers alternate, so only like is compared with like. The name itself decides between "1" and "01".
    digits = [p.lstrip("0") for p in parts[1::2]]
    parts[1::2] = [f"{len(d):05d}{d}" for d in digits]
    return (*parts, name)


def same_name(name: str) -> str:
    """Names are the same if this is: letters with accents are stored in two ways (macOS has the other one)."""
    return unicodedata.normalize("NFC", name)


def find_entry(folder: str | Path, name: str) -> str:
    """The path of `name`, which may hold slashes, below `folder`, with accents as they are stored on the disk.

    Gives the plain path where there is no such file or folder.
    """
    plain = os.path.join(folder, name)
    if name.isascii() or os.path.lexists(plain):
        return plain
    at = os.fspath(folder)
    for part in name.split("/"):
        if not os.path.lexists(os.path.join(at, part)):
            part = next((e for e in listed(at) if same_name(e) == same_name(part)), part)
        at = os.path.join(at, part)
    return at if os.path.lexists(at) else plain


def other_spelling(path: str | PurePath) -> str:
    """A name in the folder of a path that is not there, which people would take for its name; empty: none."""
    path = Path(path)
    plain = same_name(path.name).casefold()
    return next(
        (entry for entry in sorted(listed(path.parent)) if same_name(entry).strip().casefold() == plain.strip()), ""
    )


def listed(folder: str | Path) -> list[str]:
    """Names of what a folder holds; none if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def repeated(names: Iterable[str]) -> str | None:
    """A name that is there twice, as far as accents are the same; None if there is none."""
    seen: set[str] = set()
    for name in names:
        if same_name(name) in seen:
            return name
        seen.add(same_name(name))
    return None
