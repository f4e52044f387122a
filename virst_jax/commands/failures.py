"""What is told of an exception that ends a command: one line, where the user can do something about it."""

import errno
import os
import re
import sys
import traceback

from virst_jax.errors import UserError, no_device

# packages that only some commands need, and the extra of pyproject.toml that brings them
EXTRAS = {
    "array_record": "data",
    "contourpy": "export",
    "fastapi": "serve",
    "fiftyone": "fiftyone",
    "flatbuffers": "export",
    "grain": "train",
    "importlib_resources": "data",
    "jinja2": "eval",
    "matplotlib": "eval",
    "pycocotools": "data",
    "python_multipart": "serve",
    "supervision": "supervision",
    "tensorboardX": "train",
    "tensorflow_datasets": "data",
    "uvicorn": "serve",
    "wandb": "tracking",
}


def one_line(error: BaseException) -> str | None:
    """The line for a person, or None if the exception is a fault of this program and deserves its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing(error)
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, MemoryError):
        return "the host is out of memory; use a smaller model, fewer frames or --dtype bfloat16"
    return _backend(error)


def _missing(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    return f"{package} is not installed; pip install 'virst-jax[{extra}]'"


def _system(error: OSError) -> str:
    where = f"{os.fspath(error.filename)}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the disk; free some and run it again"
    reason = error.strerror or _flat(error) or type(error).__name__
    return f"{where}{reason[:1].lower()}{reason[1:]}"


def _backend(error: BaseException) -> str | None:
    """JAX without the device that was asked for, or a device that gives up."""
    text = _flat(error)
    found = re.match(r"(?:Unable to initialize backend|Unknown backend:?) '?(\w+)", text)
    asked = found[1] if found and isinstance(error, RuntimeError) else None
    if isinstance(error, AssertionError) and _raised_in(error).endswith("xla_bridge.py"):
        asked = os.environ.get("JAX_PLATFORMS", "")  # JAX asserts that the plugin is installed
    if asked is not None:
        return no_device(asked)
    if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
        if "RESOURCE_EXHAUSTED" in text:
            return f"the device is out of memory; use --dtype bfloat16 or fewer expressions at once ({text[:200]})"
        return f"the device failed: {text[:300]}"
    return None


def _raised_in(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def end_bars() -> None:
    """Ends progress bars that an exception has left on the terminal's line, so that a message has a line of its own."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)  # not loaded: no bars
    bars = list(getattr(tqdm, "_instances", ()))
    for bar in bars:
        bar.close()
    if bars:
        print(file=sys.stderr)


def leave_pipe() -> None:
    """After a BrokenPipeError: nobody reads our output, and what is still buffered must not raise again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
