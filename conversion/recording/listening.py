"""Methods of the release that are listened to, for as long as a `with` block lasts."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def around(before: Callable[..., None] | None, after: Callable[..., None] | None) -> Callable[..., Any]:
    """For `wrapped`: `before` takes the arguments, `after` the result and the arguments."""

    def listener(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args, **kwargs)
        out = call(*args, **kwargs)
        if after:
            after(out, *args, **kwargs)
        return out

    return listener


@contextlib.contextmanager
def wrapped(owner: Any, name: str, listener: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `owner.name(...)` is `listener(method, ...)`. Blocks of the same method may be nested."""
    method, before = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, lambda *args, **kwargs: listener(method, *args, **kwargs))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)  # the class's own method shows again
        else:
            setattr(owner, name, before)
