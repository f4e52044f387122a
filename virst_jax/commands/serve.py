"""`virst serve`: a page in the browser, and an HTTP interface for programs."""

import argparse
import dataclasses
import os
import secrets
from typing import TYPE_CHECKING

from virst_jax.commands import _common, failures
from virst_jax.errors import UserError
from virst_jax.io import small_model

if TYPE_CHECKING:
    from virst_jax.serve.limits import Limits
    from virst_jax.serve.service import AnyModel

PORT = 8321
TOKEN = "VIRST_TOKEN"

HELP = """Serve a page to segment videos by sentences, clicks and boxes, and an HTTP interface for programs.

The page is at http://127.0.0.1:8321/ and needs nothing from other servers. Nobody but this machine reaches it, unless
--host says otherwise; then a token is asked for. Uploads are deleted when nobody uses them for a while, and at the end.
--model is a VIRST model, or a tracker that `virst convert --sam2` wrote, which reads no sentences."""
EXAMPLES = """examples:
  virst serve
  virst serve --model virst_7b --dtype bfloat16
  VIRST_TOKEN=$(openssl rand -hex 16) virst serve --model virst_7b --host 0.0.0.0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="(default: %(default)s; 0: any free one)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument(
        "--token",
        help=f"what users must bring; also taken from {TOKEN}, which other users of this machine cannot see (default: "
        "none on this machine alone, else one is made)",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="another name of this server, such as that of a proxy; may be given several times, and asks for a token",
    )
    _common.add_model_arguments(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-upload", type=int, default=512, metavar="MB", help="of a video (default: %(default)s)")
    limits.add_argument("--max-frames", type=int, default=600, metavar="N", help="of a video (default: %(default)s)")
    limits.add_argument("--max-sessions", type=int, default=8, metavar="N", help="open videos (default: %(default)s)")
    limits.add_argument(
        "--idle-minutes", type=float, default=30.0, metavar="M", help="before a video is deleted (default: 30)"
    )


def run(args: argparse.Namespace) -> int:
    from virst_jax.serve.security import check_token, is_local
    from virst_jax.serve.server import address_of, listen, serve
    from virst_jax.serve.service import Service

    limits = _limits(args)
    token = args.token if args.token is not None else os.environ.get(TOKEN) or None
    if token is not None:
        check_token(token)
    elif args.name or not is_local(args.host):
        token = secrets.token_urlsafe(24)
    sock = listen(args.host, args.port)  # before the model, which takes long
    try:
        _common.tell(f"load the model {args.model} ...")
        model = _load(args)
        notes = [small_model.NOTE] if small_model.is_small(args.model) else []
        service = Service(model, limits, one_line=failures.one_line, notes=notes)
    except BaseException:
        sock.close()
        raise
    address = address_of(sock, args.host, token)
    try:
        told = f"open {address}  (Ctrl-C stops)"
        serve(service, sock, args.host, token, lambda: print(told, flush=True), names=args.name)
    except KeyboardInterrupt:  # how a server ends
        _common.tell("stopped; the uploaded videos are deleted")
    if service.is_stuck:
        os._exit(0)  # within a compiler's thread, the interpreter's own end could crash
    return 0


def _limits(args: argparse.Namespace) -> "Limits":
    from virst_jax.serve.limits import Limits

    for option in ("max_upload", "max_frames", "max_sessions", "idle_minutes"):
        value = getattr(args, option)
        if not 0 < value < 1 << 30:
            raise UserError(f"--{option.replace('_', '-')} is {value:g}; give a number above 0")
    return dataclasses.replace(
        Limits(),
        upload_bytes=args.max_upload << 20,
        frames=args.max_frames,
        sessions=args.max_sessions,
        idle_seconds=args.idle_minutes * 60,
    )


def _load(args: argparse.Namespace) -> "AnyModel":
    from virst_jax.io import tracker_folder

    if tracker_folder.is_tracker(args.model):
        from virst_jax import load_tracker

        return load_tracker(
            args.model, dtype=args.dtype, device=args.device, check=not args.no_check, resize=args.resize
        )
    return _common.load_model(args)
