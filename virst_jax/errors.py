"""The one exception that a user is meant to read."""

import re

# what a terminal or a file in UTF-8 cannot take: control characters and halves of surrogate pairs
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from a file with what cannot be printed as escapes, such as \\x1b and \\ud800."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def kind_of(value: object) -> str:
    """What a value is, in words, never the value itself: that may be long, or deep."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)


class UserError(Exception):
    """Bad input. Its message is one line that says what is wrong, where, and how to fix it.

    Command lines print it to stderr and exit with status 2. Names from files are part of messages, so the message
    holds nothing that cannot be printed.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def no_device(kind: str) -> str:
    """What is wrong where JAX has no device of the kind that JAX_PLATFORMS names."""
    return f"JAX finds no device of the kind {kind!r} here; set JAX_PLATFORMS=cpu, or install jax for that device"


class WriteError(UserError):
    """A file could not be written: the disk's or the store's fault, not that of what was to be written."""
