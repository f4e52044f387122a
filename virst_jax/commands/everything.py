"""`virst track --everything`: masks of all that is in an image, without a prompt."""

import argparse
from typing import TYPE_CHECKING, Any

from virst_jax.commands.progress import Progress
from virst_jax.errors import UserError

if TYPE_CHECKING:
    from virst_jax.inference.automatic import AutomaticOptions, ImageMask
    from virst_jax.inference.session import Session

# options of the command, the fields of AutomaticOptions that they set
OPTIONS: dict[str, tuple[type, str, str]] = {
    "points_per_side": (int, "N", "clicks in a row of the grid (32)"),
    "iou_threshold": (float, "X", "predicted quality, from 0 to 1, that a mask must have (0.8)"),
    "stability_threshold": (float, "X", "share of a mask that must stay when the threshold of its logits moves (0.95)"),
    "overlap_threshold": (float, "X", "of two masks whose boxes overlap more, the surer is kept (0.7)"),
    "crop_layers": (int, "N", "also look into 4 crops, then 16, ..., which shows smaller things (0)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everything in an image")
    group.add_argument("--everything", action="store_true", help="find all objects of an image, without a prompt")
    for name, (kind, metavar, text) in OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def read_options(args: argparse.Namespace) -> "AutomaticOptions | None":
    """What the command asks for; None: objects are prompted.

    Raises:
      UserError: --everything together with prompts, its options without it, or a number out of range.
    """
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if not args.everything:
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')} belongs to --everything, which was not given")
        return None
    if args.prompts:
        raise UserError(f"--everything needs no prompt; leave out --{args.prompts[0][0]}, or --everything")
    from virst_jax.inference.automatic import AutomaticOptions

    options = AutomaticOptions(**given)
    options.check()
    return options


def find(session: "Session", options: "AutomaticOptions", progress: Progress) -> "list[ImageMask]":
    """The masks of a session's image, the surest first.

    Raises:
      UserError: a video, or nothing was found.
    """
    from virst_jax.inference.automatic import find_masks

    reader = session.reader
    if reader.num_frames != 1:
        raise UserError(
            f"{reader.name}: has {reader.num_frames} frames; --everything looks at one image: give a picture, such as "
            "one frame of the video"
        )
    (pixels,) = reader.pick([0])
    found = find_masks(session.network, pixels, options, progress)
    if not found:
        raise UserError(
            f"{reader.name}: no mask has a predicted quality above {options.iou_threshold:g} and a stability of "
            f"{options.stability_threshold:g} or more; lower --iou-threshold or --stability-threshold"
        )
    return found


def described(found: "ImageMask") -> dict[str, Any]:
    """What result.json says of a mask, beside its area and box."""
    return {
        "predicted_iou": round(found.predicted_iou, 4),
        "stability": round(found.stability, 4),
        "point": [round(x, 2) for x in found.point],
        "crop": list(found.crop),
    }
