"""An indexed data set: what every reader returns. Opened once, picklable, pixels read when a sample asks for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from virst_jax.data.samples import Question, Video
from virst_jax.errors import UserError, printable
from virst_jax.io.json_files import Json


@dataclass(frozen=True)
class Problem:
    """Something wrong in a data set, and what is left out because of it. Holds nothing that cannot be printed."""

    where: str  # path of the file or folder, then what in it
    what: str
    dropped: str = ""  # "video NAME", "expression ID of NAME" and the like; empty: nothing is left out

    def __post_init__(self) -> None:
        for name in ("where", "what", "dropped"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; dropped {self.dropped}" if self.dropped else "")

    @staticmethod
    def of(error: UserError, dropped: str, where: str = "") -> "Problem":
        """An error as a problem.

        Args:
          dropped: what is left out.
          where: what the error's message starts with, and ": "; by default all before its first ": ".
        """
        text = str(error)
        if where and text.startswith(f"{where}: "):
            return Problem(where, text[len(where) + 2 :], dropped)
        before, _, what = text.partition(": ")
        return Problem(before, what, dropped) if what else Problem(where or before, text, dropped)


class Record(Protocol):
    """What a reader keeps of a sample: a name, and whatever its `make` needs."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class IndexedSource:
    """A `Source` over a list of small records; `make` turns a record into a sample and reads no pixels.

    `make` must be a function of a module, or a partial of one, so that the source can be sent to worker processes.
    """

    name: str  # of the registry
    split: str
    root: str
    records: tuple[Any, ...]  # of Record
    make: Callable[[Any], Video | Question]
    problems: tuple[Problem, ...] = field(default=(), repr=False)  # found while indexing

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Video | Question:
        return self.make(self.records[index])

    def __iter__(self) -> Iterator[Video | Question]:
        return (self.make(record) for record in self.records)

    @property
    def names(self) -> list[str]:
        """Names of all samples, without touching their files."""
        return [record.name for record in self.records]


def unknown_keys(entry: Json, known: frozenset[str], where: str) -> list[Problem]:
    """A problem that lists the keys that this reader does not know, if there are any. Nothing is dropped for it."""
    extra = sorted(str(key)[:40] for key in entry.object() if key not in known)
    if not extra:
        return []
    return [Problem(where, f"unknown keys, which are ignored: {', '.join(extra[:8])}{' ...' if extra[8:] else ''}")]
