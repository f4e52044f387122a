"""Serving until somebody stops it: the socket, the address to open, and a clean end."""

import errno
import socket
from collections.abc import Callable, Sequence
from urllib.parse import quote

import uvicorn

from virst_jax.errors import UserError
from virst_jax.serve.app import make_app
from virst_jax.serve.security import is_local
from virst_jax.serve.service import Service

CONNECTIONS = 256  # at the same time
GRACE_SECONDS = 3  # for answers that are on their way when the server stops


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds a port, so that nobody waits for a model to be loaded before hearing that it is taken.

    Args:
      port: 0: any that is free.

    Raises:
      UserError: the port is taken or not allowed, or there is no such address here.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"the port is {port}; give a number of 0 to 65535")
    shown = f"{host}:{port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise UserError(f"{host}: is no address of this machine ({error.strerror}); check --host") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(CONNECTIONS)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{shown}: another program has this port; choose one with --port, or any that is free with --port 0"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"{shown}: ports below 1024 need more rights; choose another with --port") from error
        raise UserError(f"{shown}: cannot be served ({error.strerror}); check --host and --port") from error
    return sock


def address_of(sock: socket.socket, host: str, token: str | None) -> str:
    """What to open in a browser."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sock.getsockname()[1]}/" + (f"?token={quote(token)}" if token else "")


def serve(
    service: Service,
    sock: socket.socket,
    host: str,
    token: str | None,
    ready: Callable[[], None],
    *,
    names: Sequence[str] = (),
) -> None:
    """Serves until SIGINT or SIGTERM, then ends all work and deletes all files.

    Args:
      host: that the socket listens on.
      token, names: as of `Guard`.
      ready: called when requests are answered.

    Raises:
      KeyboardInterrupt: the signal, once everything is at its end.
    """
    app = make_app(service, token=token, local=is_local(host), names=names)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # addresses hold tokens and the ids of sessions
        server_header=False,
        ws="none",
        lifespan="on",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    try:
        _Server(config, ready).run(sockets=[sock])
    finally:
        service.close()
        sock.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
