"""What the commands share: the options of a model, loading it, versions, and what the small model is."""

import argparse
import importlib.metadata
import platform
import sys
from typing import TYPE_CHECKING

from virst_jax.io import small_model

if TYPE_CHECKING:
    from virst_jax.api import Model

VIDEO_HELP = "a video file, a folder of frames, or an image"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device, --resize and --no-check, which all commands that load a model share."""
    parser.add_argument(
        "--model",
        default=small_model.SMALL,
        help='model folder; the default, "tiny", is in the package and knows moving coloured shapes only',
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of parameters and activations")
    add_device_argument(parser)
    parser.add_argument(
        "--resize", choices=["host", "device"], default="host", help="where frames are resized (default: host)"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the parameters with the digests of the model folder"
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", metavar="D", help="cpu, cuda or tpu; cuda:1 is the second (default: JAX chooses)")


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """--fps and --allow-damaged, which all commands that read a video share."""
    parser.add_argument("--fps", type=float, metavar="F", help="frames a second of a folder of frames")
    parser.add_argument(
        "--allow-damaged", action="store_true", help="go on with a damaged or cut video; the result names its frames"
    )


def load_model(args: argparse.Namespace) -> "Model":
    """The model that a command's options name.

    Raises:
      UserError: no such device, no such model, or a damaged one.
    """
    from virst_jax import load

    if args.no_check:
        tell("note: the model's parameters are not compared with their digests (--no-check)")
    return load(args.model, dtype=args.dtype, device=args.device, check=not args.no_check, resize=args.resize)


def versions(device: str | None = None) -> dict[str, str]:
    """What a result depends on: packages, and the device of this name."""
    from virst_jax.inference.placement import find_device

    packages = ("virst-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "av")
    found = find_device(device)
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{found.platform}: {found.device_kind}",
    }


def tell(message: str) -> None:
    """Something that a user should know, on stderr."""
    print(message, file=sys.stderr, flush=True)
