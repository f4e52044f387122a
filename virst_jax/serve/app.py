"""The server's application: the HTTP interface, the page, and what stands before both."""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from virst_jax.errors import UserError
from virst_jax.serve.limits import Refusal, status_of
from virst_jax.serve.routes import make_router
from virst_jax.serve.security import Guard
from virst_jax.serve.service import Service

STATIC = Path(__file__).parent / "static"
SWEEP_SECONDS = 10.0
DESCRIPTION = """Videos, sentences, clicks and boxes in; masks out.

What takes long is a job: ask for it until its state is `done`. Errors are JSON, `{"error": "one line"}`."""


def make_app(service: Service, *, token: str | None = None, local: bool = True, names: Sequence[str] = ()) -> ASGIApp:
    """An ASGI application. The service is closed when it ends.

    Args:
      token, local, names: as of `Guard`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(service))
        try:
            yield
        finally:
            sweeping.cancel()
            await anyio.to_thread.run_sync(service.close)

    app = FastAPI(
        title="virst serve",
        version=importlib.metadata.version("virst-jax"),
        description=DESCRIPTION,
        docs_url=None,  # those pages of FastAPI are loaded from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(make_router(service))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(STATIC / "docs.html")

    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed(service))
    return Guard(app, service.limits, token=token, local=local, names=names)


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(min(SWEEP_SECONDS, service.limits.idle_seconds))
        await anyio.to_thread.run_sync(service.registry.sweep)


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return JSONResponse({"error": str(error)}, status_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Refusal):  # raised while the body was read
        return await _user_error(request, error.__cause__)
    text = f"there is no {request.url.path[:80]!r} here" if error.status_code == 404 else str(error.detail)
    return JSONResponse({"error": text[:1].lower() + text[1:]}, error.status_code, dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> Response:
    """The first fault of a request's fields, in one line."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"][1:]) or str(fault["loc"][0])
    return JSONResponse({"error": f"{where[:80]}: {str(fault['msg'])[:200]}"}, 422)


def _failed(service: Service) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": service.line_of(error)}, 500)  # uvicorn logs the traceback

    return answer


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
