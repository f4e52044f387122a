"""Functions that are compiled when they are first called with arguments of some shapes, and who is told of it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class CompileWatch:
    """Told about what is compiled while a `watch_compiling` block lasts.

    Attributes:
      started: called with a step's name before it is compiled.
      seconds: that compiling took so far, with the step's first run.
    """

    started: Callable[[str], None]
    seconds: float = 0.0


_WATCH: ContextVar[CompileWatch | None] = ContextVar("compile_watch", default=None)


@contextlib.contextmanager
def watch_compiling(watch: CompileWatch) -> Iterator[None]:
    """Whatever a Network compiles inside the block, on this thread, is told to `watch`."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


class Compiled:
    """Runs functions compiled; by several threads at a time, of which one compiles what they all call.

    Args:
      context: entered around every call, such as a mesh.
    """

    def __init__(self, context: Context = contextlib.nullcontext):
        self.context = context
        self._compiled: dict[str, Any] = {}
        self._seen: set[Any] = set()
        self._compiling = threading.Lock()

    @property
    def num_compiled(self) -> int:
        """How many functions, counted by the shapes of their arguments, were compiled so far."""
        return len(self._seen)

    def _run(self, step: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Calls one of `steps`, compiled for the arguments' shapes."""
        name = step.__name__
        leaves, structure = jax.tree.flatten(args[1:])
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = (name, structure, shapes, tuple(sorted(static.items())))
        with self.context():
            if key not in self._seen:
                with self._compiling:
                    if key not in self._seen:
                        return self._compile(step, key, args, static)
            return self._compiled[name](*args, **static)

    def _compile(self, step: Callable[..., Any], key: tuple[Any, ...], args: tuple[Any, ...], static: Any) -> Any:
        """The first call with arguments of some shapes."""
        name = step.__name__
        if name not in self._compiled:
            self._compiled[name] = jax.jit(step, static_argnames=tuple(static))
        watch = _WATCH.get() or CompileWatch(lambda name: None)
        watch.started(name)
        start = time.perf_counter()
        out = self._compiled[name](*args, **static)
        watch.seconds += time.perf_counter() - start
        self._seen.add(key)
        return out
