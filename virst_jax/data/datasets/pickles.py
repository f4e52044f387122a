"""Pickles that hold plain containers: the refs(unc).p of RefCOCO. Nothing in the file is ever called or imported."""

import pickle
from pathlib import Path
from typing import Any, NoReturn

from virst_jax.errors import UserError


class _PlainUnpickler(pickle.Unpickler):
    """Builds dict, list, tuple, set, text, bytes and numbers; anything else needs a name, and no name is looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"refers to {ascii(f'{module}.{name}')[1:-1][:80]}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("refers to an object outside of the file")


def read_plain_pickle(path: Path) -> Any:
    """The contents of a pickle of plain containers. Text of Python 2 is taken for UTF-8, else Latin-1.

    Raises:
      UserError: it is missing, truncated, or holds anything but plain containers.
    """
    for encoding in ("utf-8", "latin-1"):
        try:
            with path.open("rb") as file:
                return _PlainUnpickler(file, encoding=encoding).load()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; check the data set's folder") from None
        except UnicodeDecodeError:
            continue
        except Exception as error:  # a damaged pickle raises all sorts
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{path}: not a pickle of plain lists and dicts ({reason}); nothing of it was run, get the file again"
            ) from error
    raise AssertionError("every byte is a Latin-1 letter")
