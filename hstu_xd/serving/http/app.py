"""The routes of the service, and their OpenAPI description, corrected where FastAPI is wrong."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Event, LogError
from hstu_xd.serving.http import schemas
from hstu_xd.serving.http.arrivals import Append
from hstu_xd.serving.http.batching import Busy
from hstu_xd.serving.http.jobs import (
    Forget,
    Found,
    ListUsers,
    Question,
    Rank,
    ReadHistory,
    Recommend,
    Remove,
    Score,
)
from hstu_xd.serving.http.middleware import HELD_FOR, PROBES, RETRY_AFTER, RequestGuard, page_files
from hstu_xd.serving.http.ranking_engine import RankingEngine
from hstu_xd.serving.http.schemas import User
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.swaps import SwapRefused, Swaps
from hstu_xd.serving.stores import StoreError
from hstu_xd.version import __version__

_ERRORS: dict[int, dict[str, Any]] = {
    400: {"description": "A value is wrong; nothing has changed."},
    403: {"description": "The service has no token, without which its model stays."},
    409: {"description": "Another swap is under way, or a shadow is there; the model stays."},
    413: {"description": "The body is too large."},
    503: {
        "description": "Busy, stopping, or event log or state store fail. Nothing was taken.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    },
}


# The pages use their own files and nothing from elsewhere, and nobody else's page may show them.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


# Levels of JSON that any body needs: an object, its list of events, an event.
_LEVELS = 3


class _AnyText(PathConvertor):
    """A part of a path that has any characters: a user's name may have line breaks."""

    regex = "(?s:.*)"


register_url_convertor("text", _AnyText())


def build_app(service: Service, swaps: Swaps | None = None) -> RequestGuard:
    """Build the ASGI application of a service.

    Args:
        service: that answers.
        swaps: puts other models in place; None: there is only this one.
    """
    app = FastAPI(
        title="hstu-xd",
        version=__version__,
        description="Recommendations for any domain from histories that cross domains. Every "
        "answer names the model that gave it in X-Model, and its request in X-Request-ID, which a "
        "request may bring.",
        docs_url=None,
        redoc_url=None,
        # Its own spans have the path and what is wrong with a body, and so names of users.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _handle_errors(app)
    bodies = schemas.RequestBodies(service.settings.limits)
    _add_writes(app, service, bodies)
    if isinstance(service.model.engine, RankingEngine):
        _add_ranking(app, service, bodies)
        if service.model.engine.search is None:
            _say_what_answers(app, service, ("/v1/recommend", "/v1/score"), "/v1/rank")
        else:
            _add_search(app, service, bodies)
            _say_what_answers(app, service, ("/v1/score",), "/v1/rank or /v1/recommend")
    else:
        _add_retrieval(app, service, bodies)
        _say_what_answers(app, service, ("/v1/rank",), "/v1/recommend or /v1/score")
    _add_reads(app, service)
    _add_operation(app, service)
    if swaps is not None:
        _add_swaps(app, service, swaps)
    _add_page(app)
    _describe(app, service)
    return RequestGuard(app, service)


def _add_writes(app: FastAPI, service: Service, bodies: schemas.RequestBodies) -> None:
    @app.post(
        "/v1/events",
        response_model=schemas.Accepted,
        response_model_exclude_defaults=True,
        responses=_errors(400, 413, 503),
    )
    async def events(
        body: bodies.events,
        idempotency_key: Annotated[
            schemas.Key | None,
            Header(description="A request that is sent again with the same key counts once."),
        ] = None,
    ) -> Response:
        """Take events. Once they are answered they are safe on disk."""
        events = [Event(each.user, each.item, each.timestamp) for each in body.events]
        keys = [_key(each.id, idempotency_key, i) for i, each in enumerate(body.events)]
        outcome = await service.run(Append(events, keys, body.partial))
        answer: dict[str, Any] = {"accepted": len(outcome.accepted)}
        if outcome.repeated:
            answer["repeated"] = outcome.repeated
        if outcome.refused:
            answer["refused"] = [
                {"index": index, "error": error} for index, error in outcome.refused
            ]
        return JSONResponse(answer)

    @app.post("/v1/events/remove", response_model=schemas.Removed, responses=_errors(400, 413, 503))
    async def remove(body: schemas.RemoveBody) -> Response:
        """Remove one event of a user, from the log and from what was known before the service."""
        event = Event(body.user, body.item, body.timestamp)
        return JSONResponse({"removed": await service.run(Remove(event))})

    @app.delete(
        "/v1/users/{user:text}", response_model=schemas.Forgotten, responses=_errors(400, 413, 503)
    )
    async def forget(user: User) -> Response:
        """Forget a user: states, events, and what was known before the service.

        The name alone stays in the log, so that earlier histories of it stay hidden.
        """
        return JSONResponse({"forgotten": await service.run(Forget(user))})


def _add_retrieval(app: FastAPI, service: Service, bodies: schemas.RequestBodies) -> None:
    @app.post(
        "/v1/recommend", response_model=schemas.Recommendations, responses=_errors(400, 413, 503)
    )
    async def recommend(body: bodies.recommend) -> Response:
        """Recommend the best items of domains; to an unknown user what the model starts with."""
        job = Recommend(body.user, body.domains, body.timestamp, body.k, body.exclude_seen)
        return await _recommended(service, job)

    @app.post("/v1/score", response_model=schemas.Scores, responses=_errors(400, 413, 503))
    async def score(body: bodies.score) -> Response:
        """Score given items of a domain; they do not see each other."""
        job = Score(body.user, body.domain, body.timestamp, body.items)
        found: Found = await service.run(job)
        return JSONResponse({"scores": found.rows}, background=_shadowed(service, job, found))


async def _recommended(service: Service, job: Recommend) -> Response:
    found: Found = await service.run(job)
    rows = [
        {"domain": name, "items": [{"item": item, "score": score} for item, score in pairs]}
        for name, pairs in zip(job.domains, found.rows)
    ]
    answer = {"user": job.user, "recommendations": rows}
    return JSONResponse(answer, background=_shadowed(service, job, found))


def _shadowed(service: Service, job: Question, found: Found) -> BackgroundTask | None:
    """Return what is done with an answer once it is sent."""
    shadow = service.shadow  # It may end at any moment.
    return None if shadow is None else BackgroundTask(shadow.offer, job, found)


def _add_ranking(app: FastAPI, service: Service, bodies: schemas.RequestBodies) -> None:
    @app.post("/v1/rank", response_model=schemas.Ranked, responses=_errors(400, 413, 503))
    async def rank(body: bodies.rank) -> Response:
        """Give the chance that each candidate is taken; to an unknown user without a history."""
        engine = service.model.engine
        assert isinstance(engine, RankingEngine)
        goals = engine.goals if body.goal is None else (body.goal,)
        job = Rank(body.user, body.candidates, goals, body.timestamp)
        found: Found = await service.run(job)
        rows = [{"goal": goal, "scores": scores} for goal, scores in zip(goals, found.rows)]
        answer = {"user": body.user, "goals": rows}
        return JSONResponse(answer, background=_shadowed(service, job, found))


def _add_search(app: FastAPI, service: Service, bodies: schemas.RequestBodies) -> None:
    @app.post(
        "/v1/recommend", response_model=schemas.Recommendations, responses=_errors(400, 413, 503)
    )
    async def recommend(body: bodies.best) -> Response:
        """Recommend the best items of domains for a goal, with the chances that they are taken."""
        asked = (body.user, body.domains, body.timestamp, body.k, body.exclude_seen, body.goal)
        return await _recommended(service, Recommend(*asked))


def _say_what_answers(app: FastAPI, service: Service, asked: Sequence[str], instead: str) -> None:
    """Answer what only runs of the other kind answer: 404, and what this one does."""

    async def other(_: Request) -> Response:
        text = f"{service.model.name} is a {service.model.engine.kind} run; ask POST {instead}"
        return JSONResponse({"error": f"{text}, or serve a run of the other kind"}, 404)

    for path in asked:
        app.add_api_route(path, other, methods=["POST"], include_in_schema=False)


def _key(own: str | None, of_request: str | None, index: int) -> str | None:
    """Return what an event is known by: its own id, or the request's key and its place in it."""
    if own is not None:
        return f"event {own}"
    return None if of_request is None else f"request {index} {of_request}"


def _add_reads(app: FastAPI, service: Service) -> None:
    @app.get("/v1/domains", response_model=schemas.Domains, responses=_errors(400, 413, 503))
    async def domains() -> Response:
        """Return all domains, and how many items they have."""
        catalog = service.present().catalog
        counts = zip(catalog.domain_names, catalog.domain_offsets.diff().tolist())
        return JSONResponse({"domains": [{"name": name, "items": count} for name, count in counts]})

    @app.get("/v1/users", response_model=schemas.Users, responses=_errors(400, 413, 503))
    async def users(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        prefix: Annotated[str, Query(max_length=256)] = "",
    ) -> Response:
        """Return the users whose names begin with a text, in order."""
        return JSONResponse({"users": await service.run(ListUsers(prefix, limit))})

    @app.get(
        "/v1/users/{user:text}/history",
        response_model=schemas.UserHistory,
        responses=_errors(400, 413, 503),
    )
    async def history(user: User, limit: Annotated[int, Query(ge=1, le=10_000)] = 200) -> Response:
        """Return a user's last events, oldest first; none of an unknown user."""
        rows = [
            {"item": event.item, "domain": domain, "timestamp": event.timestamp}
            for event, domain in await service.run(ReadHistory(user, limit))
        ]
        return JSONResponse({"user": user, "events": rows})


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=schemas.Health, responses={503: {"model": schemas.Health}})
    async def healthz() -> Response:
        """Say whether requests are taken: 200, or 503 while it stops, cannot write, or failed."""
        await service.check_writes()
        status = service.status
        health = {
            "status": status,
            "model": service.present().name,
            "store": service.store_state,
            "writes": service.writes_state,
        }
        return JSONResponse(health, 200 if status == "ready" else 503)

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", response_model=schemas.Alive, responses={503: {"model": schemas.Alive}})
    async def livez() -> Response:
        """Say whether the process does its work: 503 where only starting it again helps."""
        return JSONResponse({"live": service.live}, 200 if service.live else 503)

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", response_model=schemas.Ready, responses={503: {"model": schemas.Ready}})
    async def readyz() -> Response:
        """Say whether to send requests here: 503 while it drains, or cannot write."""
        await service.check_writes()
        status = service.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", response_class=Response, include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_swaps(app: FastAPI, service: Service, swaps: Swaps) -> None:
    errors = _errors(400, 403, 409, 413, 503)

    def check_token() -> None:
        if service.settings.token is None:
            raise HTTPException(
                403, "models are changed with a token only; start serve with --token-file"
            )

    def present() -> Response:
        model, shadow = service.present().name, service.shadow
        seen = None if shadow is None else {"model": shadow.name, "state": shadow.state}
        return JSONResponse({"model": model, "shadow": seen})

    @app.post("/v1/models", response_model=schemas.Swapped | schemas.Shadowed, responses=errors)
    async def models(body: schemas.SwapBody) -> Response:
        """Let another run answer, or answer in the shadow of the one that does.

        It is loaded and checked first, and requests go on meanwhile.
        """
        check_token()
        if body.mode == "shadow":
            found = asdict(await swaps.shadow(body.run))
            names = {"shadow": found.pop("model"), "model": found.pop("previous")}
            return JSONResponse(names | found)
        changes = await swaps.to(body.run)
        service.present()
        return JSONResponse(asdict(changes))

    @app.get("/v1/models", response_model=schemas.Models, responses=_errors(400, 413, 503))
    async def present_models() -> Response:
        """Return the model that answers, and the one in its shadow."""
        return present()

    @app.delete("/v1/models/shadow", response_model=schemas.Models, responses=errors)
    async def end_shadow() -> Response:
        """End the shadow, whether or not there is one; requests go on meanwhile."""
        check_token()
        await swaps.end_shadow()
        return present()


def _add_page(app: FastAPI) -> None:
    """Serve the files of the page, each at its name; they hold no data and need no token."""
    files = page_files()

    async def page(request: Request) -> Response:
        return FileResponse(files[request.scope["path"]], headers=_PAGE_HEADERS)

    for path in files:
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)


def _handle_errors(app: FastAPI) -> None:
    async def wrong(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse({"error": "; ".join(map(_sentence, error.errors()[:3]))}, 400)

    async def unavailable(_: Request, error: Exception) -> Response:
        if isinstance(error, Busy):
            await asyncio.sleep(HELD_FOR)
        return JSONResponse({"error": str(error)}, 503, headers=RETRY_AFTER)

    async def conflict(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 409)

    async def other(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = str(error.detail)
        if isinstance(cause := error.__cause__, RecursionError | ValueError):
            text = _unparsed(cause)
        return JSONResponse({"error": text}, error.status_code, headers=error.headers)

    async def broken(_: Request, error: Exception) -> Response:
        text = f"the service failed ({type(error).__name__}); its log on stderr says more"
        return JSONResponse({"error": text}, 500)

    app.add_exception_handler(InputError, wrong)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (Busy, StoreError, LogError):
        app.add_exception_handler(kind, unavailable)
    app.add_exception_handler(SwapRefused, conflict)
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(Exception, broken)


def _unparsed(cause: Exception) -> str:
    """Say why a body could not be read, where FastAPI says only that it could not."""
    if isinstance(cause, RecursionError):
        return (
            "the body is nested too deeply; send an object, with lists in it and objects in those: "
            f"at most {_LEVELS} levels"
        )
    # What comes behind is advice for programmers in Python.
    return f"the body is not JSON: {str(cause).partition(';')[0]}"


def _sentence(problem: dict[str, Any]) -> str:
    """Say which field is wrong, and how."""
    kind, *place = problem["loc"]
    field = ".".join(map(str, place)) or str(kind)
    given = problem.get("input")
    if isinstance(given, float) and not math.isfinite(given):
        return f"{field} is {given}; a finite whole number is needed"
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    if isinstance(given, int | float | bool | str | None):
        text = repr(given)
        return f"{field} is {text if len(text) < 100 else text[:100] + '...'}: {problem['msg']}"
    return f"{field}: {problem['msg']}"


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return descriptions of what may go wrong."""
    return {status: {"model": schemas.ErrorBody} | _ERRORS[status] for status in statuses}


def _describe(app: FastAPI, service: Service) -> None:
    """Correct what FastAPI says by itself: bad input is 400 here, and there may be a token."""
    description = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    if service.settings.root_path:
        description["servers"] = [{"url": service.settings.root_path}]
    if service.settings.token is not None:
        description["components"]["securitySchemes"] = {
            "token": {"type": "http", "scheme": "bearer"}
        }
        error = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
        for name, path in description["paths"].items():
            for operation in path.values():
                if name not in PROBES:
                    operation["security"] = [{"token": []}]
                    operation["responses"]["401"] = {
                        "description": "The token is missing or wrong.",
                        "content": {"application/json": error},
                    }
    app.openapi = lambda: description
