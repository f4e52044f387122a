"""The form that brings a video, read without holding it in memory."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from virst_jax.errors import UserError
from virst_jax.serve.limits import Limits, Refusal

MAX_FIELDS = 64
FIELD_BYTES = 16 << 10
KNOWN = ("video", "sentence", "every", "allow_damaged", "sample")


@dataclass(frozen=True)
class Form:
    """What a form holds: the file's path (None: there is none) and how its user calls it, and the other fields."""

    path: Path | None
    name: str
    sentences: list[str]
    every: int
    allow_damaged: bool
    sample: bool


async def receive_form(
    request: Request, folder: Path, name_of: Callable[[str | None], tuple[str, str]], limits: Limits
) -> Form:
    """Stores the form's video in a folder.

    Args:
      name_of: what messages call a file, and the name to store it by.

    Raises:
      UserError: no such form, or a field that cannot be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal("send a form (multipart/form-data), such as curl's -F makes", 415)
    async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=FIELD_BYTES) as form:
        unknown = next((key for key in form if key not in KNOWN), None)
        if unknown is not None:
            raise UserError(f"the form has an unknown field {unknown[:40]!r}; known are {', '.join(KNOWN)}")
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
            _yes(form, "sample"),
        )


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
