"""Forms: one that brings a video, read without holding it in memory, and one that brings a mask."""

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from virst_jax.errors import UserError
from virst_jax.serve.limits import Limits, Refusal

MAX_FIELDS = 64
FIELD_BYTES = 16 << 10
KNOWN = ("video", "sentence", "every", "allow_damaged", "exclusive", "sample")
KNOWN_WITH_MASK = ("mask", "frame", "object_id")


@dataclass(frozen=True)
class Form:
    """What a form holds: the file's path (None: there is none) and how its user calls it, and the other fields."""

    path: Path | None
    name: str
    sentences: list[str]
    every: int
    allow_damaged: bool
    exclusive: bool
    sample: bool


@dataclass(frozen=True)
class MaskForm:
    """What a form with a mask holds: the image file's content, the frame, and the object (None: a new one)."""

    content: bytes
    frame: int
    object_id: int | None


async def receive_form(
    request: Request, folder: Path, name_of: Callable[[str | None], tuple[str, str]], limits: Limits
) -> Form:
    """Stores the form's video in a folder.

    Args:
      name_of: what messages call a file, and the name to store it by.

    Raises:
      UserError: no such form, or a field that cannot be.
    """
    async with _form(request, KNOWN) as form:
        video = form.get("video")
        path, name = None, ""
        if isinstance(video, UploadFile):
            name, stored = name_of(video.filename)
            path = folder / stored
            await anyio.to_thread.run_sync(_store, video, path)
        elif video is not None:
            raise UserError("the form's field 'video' is text; send a file, with curl as -F video=@dog.mp4")
        return Form(
            path,
            name,
            [text for text in form.getlist("sentence") if isinstance(text, str)],
            _every(form, limits.every),
            _yes(form, "allow_damaged"),
            _yes(form, "exclusive"),
            _yes(form, "sample"),
        )


async def receive_mask(request: Request) -> MaskForm:
    """Reads a form with an image of a mask.

    Raises:
      UserError: no such form, or a field that cannot be.
    """
    async with _form(request, KNOWN_WITH_MASK) as form:
        mask = form.get("mask")
        if not isinstance(mask, UploadFile):
            what = "is text" if mask is not None else "is missing"
            raise UserError(f"the form's field 'mask' {what}; send an image, with curl as -F mask=@mask.png")
        if form.get("frame") is None:
            raise UserError("the form's field 'frame' is missing; give the number of the frame that the mask is of")
        object_id = None if form.get("object_id") is None else _number(form, "object_id")
        return MaskForm(await mask.read(), _number(form, "frame"), object_id)


@contextlib.asynccontextmanager
async def _form(request: Request, known: tuple[str, ...]) -> AsyncIterator[FormData]:
    """The form of a request, whose fields are known ones."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal("send a form (multipart/form-data), such as curl's -F makes", 415)
    async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=FIELD_BYTES) as form:
        unknown = next((key for key in form if key not in known), None)
        if unknown is not None:
            raise UserError(f"the form has an unknown field {unknown[:40]!r}; known are {', '.join(known)}")
        yield form


def _number(form: FormData, name: str) -> int:
    given = form.get(name)
    if not isinstance(given, str) or not given.isdecimal() or len(given) > 9:
        raise UserError(f"the field {name!r} must be a number of 0 or more")
    return int(given)


def _store(video: UploadFile, path: Path) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(video.file, file, 1 << 20)


def _every(form: FormData, most: int) -> int:
    given = form.get("every", "1")
    if not isinstance(given, str) or not given.isdecimal() or not 1 <= len(given) <= 9 or not 1 <= int(given) <= most:
        raise UserError(f"the field 'every' must be a number of 1 to {most}")
    return int(given)


def _yes(form: FormData, name: str) -> bool:
    given = form.get(name, "false")
    if not isinstance(given, str) or given.lower() not in ("true", "false", "1", "0"):
        raise UserError(f"the field {name!r} must be true or false")
    return given.lower() in ("true", "1")
