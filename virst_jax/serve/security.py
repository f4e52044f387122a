"""What stands before every request: who may ask, from which page, and how much they may send.

A server on this machine alone needs no token, but any page that its user visits could send requests to it. So the names
by which it is called are checked (a page of another name may point that name here, "DNS rebinding"), and what another
site's page sends is refused.
"""

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from virst_jax.errors import UserError
from virst_jax.serve.limits import Limits, Refusal

COOKIE = "virst_token"
FEWEST_CHARACTERS = 16  # of a token
UPLOADS = ("/segment", "/sessions")
MASKS = re.compile(r"/sessions/[^/]+/masks")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(token: str) -> str:
    """Raises UserError: a token that could be guessed, or that no header can hold."""
    if len(token) < FEWEST_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"the token must have {FEWEST_CHARACTERS} characters at least, letters, digits and signs of ASCII without "
            "spaces; leave it out, and one is made"
        )
    return token


class Guard:
    """Refuses requests that may not be served, and limits what is read of the others.

    Args:
      token: None: nobody is asked for one.
      local: the server listens for this machine alone, so that only names of this machine can mean it.
      names: other names that it has, such as that of a proxy before it.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, *, token: str | None = None, local: bool = True, names: Sequence[str] = ()
    ):
        self.app, self.limits, self.token, self.local = app, limits, token, local
        self.names = {*LOCAL_NAMES, *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no web sockets here
        send = _with_headers(send, scope["path"])
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_place(scope, headers)
            if self.token is not None and (answer := self._ask(scope, headers)) is not None:
                await _send_plain(send, *answer)
                return
            limit = self._limit_of(scope["path"])
            self._check_length(headers, limit)
        except Refusal as error:
            await _send_plain(send, error.status, {"content-type": "application/json"}, _json(error))
            return
        await self.app(scope, _Limited(receive, limit), send)

    def _check_place(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Which name the server is called by, and whose page calls it."""
        host = headers.get("host", "")
        if self.local and _name(host) not in self.names:
            raise Refusal(f"this server is not called {_name(host)[:80]!r}; give its other names with --name", 421)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        opens_page = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not opens_page:
            raise Refusal("requests from pages of other sites are refused", 403)
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower() and scope["method"] != "GET":
            raise Refusal("requests from pages of other sites are refused", 403)

    def _ask(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes] | None:
        """An answer to who has no right to be here, or who brings the token in the address; None: go on."""
        assert self.token is not None
        secure = scope.get("scheme") == "https" or headers.get("x-forwarded-proto") == "https"
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and same(given, self.token):
            return None
        if same(_cookie(headers.get("cookie", ""), self._cookie_name(scope)), _seal(self.token)):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] == "GET" and any(key == "token" and same(value, self.token) for key, value in query):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            # a path of two slashes would lead to another host
            place = "/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else "")
            cookie = f"{self._cookie_name(scope)}={_seal(self.token)}; Path=/; HttpOnly; SameSite=Strict"
            return 303, {"location": place, "set-cookie": cookie + ("; Secure" if secure else "")}, b""
        raise Refusal(
            "a token is needed: open the address that `virst serve` has printed, or send it as 'Authorization: Bearer "
            "TOKEN'",
            401,
        )

    @staticmethod
    def _cookie_name(scope: Scope) -> str:
        # browsers send cookies to all ports of a host
        server = scope.get("server")
        return f"{COOKIE}_{server[1]}" if server else COOKIE

    def _limit_of(self, path: str) -> int:
        """The most bytes of a request's body."""
        if path in UPLOADS:
            return self.limits.upload_bytes
        return self.limits.mask_bytes if MASKS.fullmatch(path) else self.limits.body_bytes

    @staticmethod
    def _check_length(headers: Mapping[str, str], limit: int) -> None:
        stated = headers.get("content-length", "0")
        if not stated.isdecimal():
            raise Refusal("the content's length is no number", 400)
        if len(stated) > 18 or int(stated) > limit:
            raise too_large(limit)


class _Limited:
    """The body of a request; reading more than the limit raises."""

    def __init__(self, receive: Receive, limit: int):
        self._receive, self._limit, self._left = receive, limit, limit

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise too_large(self._limit)
        return message


def too_large(limit: int) -> Refusal:
    shown = f"{limit / (1 << 20):.4g} MB" if limit >= 1 << 20 else f"{limit / (1 << 10):.4g} kB"
    return Refusal(f"the request is larger than {shown}, the limit of this server", 413)


def same(given: str, token: str) -> bool:
    """Whether two texts are the same, in a time that says nothing of where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode("utf-8", "surrogateescape"))


def _seal(token: str) -> str:
    """What the cookie holds: enough for this server, and not the token."""
    return hashlib.sha256(b"virst serve cookie\0" + token.encode()).hexdigest()


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _name(host: str) -> str:
    """A host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _json(error: UserError) -> bytes:
    return json.dumps({"error": str(error)}).encode()


def _with_headers(send: Send, path: str) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message.get("headers", [])}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            if b"cache-control" not in given:
                more.append((b"cache-control", b"no-store"))
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return wrapped


async def _send_plain(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
