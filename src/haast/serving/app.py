"""The HTTP application: loads the model in the background, mounts the routes and the chat page, answers errors.

Owns the application's state and its error handlers. Access checks are in `security`, routes in `routes`. Until the
model is loaded, /health and all routes that need it answer 503.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from haast.serving.api_errors import ApiError, invalid
from haast.serving.config import ServeConfig
from haast.serving.routes import ROUTES
from haast.serving.security import Guarded, Rates
from haast.serving.service import Service
from haast.serving.streaming import Json, api_error

_LOG = logging.getLogger("haast.serving")
_STATIC = Path(__file__).parent / "static"
_SHARED = Path(__file__).parents[1] / "bench" / "templates"  # files that the chat page shares with the report


class AppState:
    """State of the running application: the service once it is loaded, and whether the server is shutting down."""

    def __init__(self, config: ServeConfig, name: str) -> None:
        self.config, self.name = config, name
        self.loaded: Service | None = None
        self.failure: BaseException | None = None
        self.closing = False
        self.rates = Rates(config)

    @property
    def service(self) -> Service:
        """The loaded service. Raises ApiError 503 while the model loads and during a shutdown."""
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if self.loaded is None:
            words = "the model is loading: try again" if self.failure is None else "the model could not be loaded"
            raise ApiError(503, words, code="loading", headers={"Retry-After": "2"})
        return self.loaded

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error before it started."""
        if self.loaded is not None:
            self.loaded.metrics.refuse(status)

    def close(self) -> None:
        """Refuse further requests."""
        self.closing = True

    def end_all(self) -> None:
        """Cancel the running requests; their clients get an error."""
        if self.loaded is not None:
            self.loaded.end_all()


def make_app(
    load: Callable[[], Service], config: ServeConfig, name: str, failed: Callable[[], None] | None = None
) -> tuple[ASGIApp, AppState]:
    """Build the application and its state.

    Args:
        load: loads the service; called in a thread of its own.
        config: of the server.
        name: the model's name for clients.
        failed: called if loading fails.
    """
    state = AppState(config, name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(state, load, failed))
        yield
        await asyncio.gather(loading, return_exceptions=True)

    app = FastAPI(title="Haast", lifespan=lifespan, docs_url=None, redoc_url=None, description=__doc__)
    app.state.haast = state
    app.add_exception_handler(ApiError, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _problem)
    app.include_router(ROUTES)
    _page(app)
    guarded: ASGIApp = Guarded(_ErrorBoundary(app), config, state.rates, state.refused)
    if config.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(config.origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"], expose_headers=["x-request-id"],
        )  # fmt: skip
    return guarded, state


class _ErrorBoundary:
    """Stops unexpected errors of an application, which its handlers have answered and logged already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except ApiError:
            raise
        except Exception as error:  # Starlette raises it again after its handler has answered
            if scope["type"] != "http":
                raise
            _LOG.debug("answered with an error", exc_info=error)


async def _load(state: AppState, load: Callable[[], Service], failed: Callable[[], None] | None) -> None:
    try:
        state.loaded = await run_in_threadpool(load)
    except Exception as error:
        state.failure = error
        if failed is not None:
            failed()


def _page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Any:
        return FileResponse(_STATIC / "index.html")

    @app.get("/static/common.css", include_in_schema=False)
    async def common() -> Any:
        return FileResponse(_SHARED / "common.css")

    @app.get("/static/page.js", include_in_schema=False)
    async def script() -> Any:
        return FileResponse(_SHARED / "page.js")

    app.mount("/static", StaticFiles(directory=_STATIC))


async def _problem(request: Request, error: Exception) -> Json:
    problem = api_error(error)
    request.app.state.haast.refused(problem.status)
    return Json(problem.body(), status_code=problem.status, headers=problem.headers)


async def _invalid(request: Request, error: Exception) -> Json:
    assert isinstance(error, RequestValidationError), "its handler"
    return await _problem(request, invalid(error.errors()[0]))


async def _http(request: Request, error: Exception) -> Json:
    assert isinstance(error, HTTPException), "its handler"
    messages = {404: "this path does not exist", 405: "this path does not accept this HTTP method"}
    message = messages.get(error.status_code, str(error.detail))
    problem = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return await _problem(request, problem)
