"""`negfast serve`: live scoring over HTTP.

One thread asks and extends the live run, so what waits together is answered in one batch; another writes the event
file. A handler checks its request, puts it into a queue, and answers when its batch is done.
"""

import asyncio
import hmac
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from negfast.errors import InputError
from negfast.serve.journal import Event, Journal
from negfast.serve.live import Live
from negfast.serve.restart import SIGNALS, Server, sockets_of, start_again
from negfast.serve.run import Run

TOKEN = "NEGFAST_TOKEN"  # the environment variable of the bearer token
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BODY_BYTES = 1 << 20  # of a request, at most
CANDIDATES = 10_000  # of a request, at most
EVENTS = 1000  # of a request, at most
AT_ONCE = 4096  # candidates, or events, after which a batch takes no more requests
AHEAD = 300  # seconds by which a client's clock may go fast
KEYS = 100_000  # of the last events that had one are known
WAITING = 1024  # requests in a queue; more are told to come again
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)  # buckets of the latency histogram

T = TypeVar("T")
Id = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ScoreRequest(Body):
    user: Id
    items: Annotated[list[Id], Field(min_length=1, max_length=CANDIDATES)]


class ScoreReply(BaseModel):
    """P(dislike | the user gives feedback) of each item; null where nothing is known of user and item."""

    scores: list[float | None]


class PredictRequest(Body):
    user: Id
    top: Annotated[int, Field(ge=1, le=1000)] = 50


class Listed(BaseModel):
    item: str
    score: float


class PredictReply(BaseModel):
    """The user's most probable next dislikes, best first."""

    items: list[Listed]


class NewEvent(Body):
    user: Id
    item: Id
    feedback: Literal["shown", "like", "dislike", "withdrawn"]
    time: Annotated[int | None, Field(ge=0, le=1 << 40)] = None  # seconds since 1970; that of arrival by default
    value: Annotated[float | None, Field(allow_inf_nan=False)] = None
    text: Annotated[str | None, Field(max_length=10_000)] = None  # of an item that may be new
    key: Id | None = None  # the client's name of the event: sent again, it counts once


class EventsRequest(Body):
    events: Annotated[list[NewEvent], Field(min_length=1, max_length=EVENTS)]


class Refused(BaseModel):
    index: int
    reason: str


class EventsReply(BaseModel):
    """How many events are kept, on the disk and in the answers to come; how many of them were kept before, by their
    keys; how many came late and count from now on; and which are not kept."""

    accepted: int
    known: int
    late: int
    refused: list[Refused]


class Metrics:
    """What `/metrics` tells, of one service."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("negfast_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "negfast_request_seconds", "Time to answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self.batch = Histogram(
            "negfast_batch_requests", "Requests scored together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.candidates = Counter("negfast_candidates", "Candidates scored.", registry=registry)
        self.events = Counter("negfast_events", "Events kept.", registry=registry)
        self.refused = Counter("negfast_events_refused", "Events refused.", registry=registry)
        self.loaded = Gauge("negfast_run_loaded_timestamp_seconds", "When the run was loaded.", registry=registry)


class Service:
    """A live run and its event file behind two queues."""

    def __init__(self, load: Callable[[], Run], journal: Journal | None) -> None:
        """``load`` opens the run as it lies on the disk. Without ``journal`` events last as long as the process."""
        self.load, self.journal, self.metrics = load, journal, Metrics()
        self.model = ThreadPoolExecutor(1, "model")  # the live run is touched by this thread alone
        self.disk = ThreadPoolExecutor(1, "disk")
        self.questions: asyncio.Queue[tuple[ScoreRequest, asyncio.Future]] = asyncio.Queue(WAITING)
        self.news: asyncio.Queue[tuple[list[Event], asyncio.Future]] = asyncio.Queue(WAITING)
        self.adding = asyncio.Lock()  # held while events are added, and while a new run takes the old one's place
        self.pending: int | None = None  # moment of the first event that was checked and is not learned yet
        self.keys: dict[str, None] = {}  # of events that are kept, the newest last
        if journal is not None:
            self._remember(journal.read(max(0, journal.events - KEYS)))
        self.run, self.live = self._open()

    async def score(self, request: ScoreRequest) -> list[float | None]:
        return await _queued(self.questions, request)

    async def predict(self, request: PredictRequest) -> PredictReply:
        """From the data set's end: lists follow events when a new run is loaded."""
        table = await self._on(self.model, self.run.predict, [request.user], request.top)
        rows = zip(table["item"].to_pylist(), table["score"].to_pylist(), strict=True)
        return PredictReply(items=[Listed(item=item, score=score) for item, score in rows])

    async def add(self, events: list[Event]) -> EventsReply:
        return await _queued(self.news, events)

    async def answer_questions(self) -> None:
        """Forever: the questions that wait become a batch."""
        while True:
            batch = await _waiting(self.questions, lambda request: len(request.items))
            self.metrics.batch.observe(len(batch))
            await _settle(batch, self._on(self.model, self._score, [request for request, _ in batch]))

    async def keep_events(self) -> None:
        """Forever: the events that wait go to the event file together, then into the live run."""
        while True:
            batch = await _waiting(self.news, len)
            async with self.adding:
                await _settle(batch, self._keep([events for events, _ in batch]))

    async def reload(self) -> None:
        """Loads the run as it lies on the disk now; requests are answered by the one of before until it is ready."""
        known = 0 if self.journal is None else self.journal.events
        loop = asyncio.get_running_loop()
        try:
            run, live = await loop.run_in_executor(None, self._open)
            async with self.adding:
                await loop.run_in_executor(None, self._replay, live, known)
                self.run, self.live = run, live
        except (InputError, OSError) as error:
            print(f"serve: not reloaded: {error}", file=sys.stderr)
        else:
            print(f"serve: reloaded {run.path}", file=sys.stderr)

    def close(self) -> None:
        self.model.shutdown()
        self.disk.shutdown()
        if self.journal is not None:
            self.journal.close()

    def _open(self) -> tuple[Run, Live]:
        run = self.load()
        live = run.live()
        self._replay(live, 0)
        self.metrics.loaded.set_to_current_time()
        return run, live

    def _replay(self, live: Live, first: int) -> None:
        """Adds the event file's events from number ``first`` on, but for those that the run's data set holds."""
        for event in () if self.journal is None else self.journal.read(first):
            if event.time > live.data_until:
                live.add(event.user, event.item, event.time, event.feedback, event.value, event.text)

    def _score(self, requests: Sequence[ScoreRequest]) -> list[list[float | None]]:
        users = [request.user for request in requests for _ in request.items]
        items = [item for request in requests for item in request.items]
        moment = self.live.moment(int(time.time()))
        if self.pending is not None:
            moment = min(moment, self.pending)
        scores = self.live.score(users, items, at=np.datetime64(max(moment, self.live.since), "s"))
        self.metrics.candidates.inc(len(items))
        known = (None if abstain else p for p, abstain in zip(scores.probability.tolist(), scores.abstain, strict=True))
        return [list(islice(known, len(request.items))) for request in requests]

    async def _keep(self, batch: list[list[Event]]) -> list[EventsReply]:
        kept, replies = await self._on(self.model, self._check, batch)
        try:
            if kept and self.journal is not None:
                await self._on(self.disk, self.journal.append, kept)
            await self._on(self.model, self._learn, kept)
        finally:
            self.pending = None
        self.metrics.events.inc(len(kept))
        self.metrics.refused.inc(sum(len(reply.refused) for reply in replies))
        return replies

    def _check(self, batch: list[list[Event]]) -> tuple[list[Event], list[EventsReply]]:
        """The events that are kept, late ones moved to the present, and what is replied."""
        live, kept, replies = self.live, [], []
        since, soon = live.since, int(time.time()) + AHEAD
        new: set[str] = set()
        for events in batch:
            known, late, refused = 0, 0, []
            for index, event in enumerate(events):
                if event.key in self.keys or event.key in new:
                    known += 1
                    continue
                moved = event
                if live.data_until < event.time and live.moment(event.time) < since:
                    moved = replace(event, time=since)
                if (reason := self._refusal(moved, since, soon)) is not None:
                    refused.append(Refused(index=index, reason=reason))
                    continue
                kept.append(moved)
                if event.key is not None:
                    new.add(event.key)
                late += moved is not event
                since = max(since, live.moment(moved.time))
            replies.append(EventsReply(accepted=len(events) - len(refused), known=known, late=late, refused=refused))
        self.pending = live.moment(kept[0].time) if kept else None
        return kept, replies

    def _refusal(self, event: Event, since: int, soon: int) -> str | None:
        if event.time > soon:
            return f"time: found {event.time}, which is yet to come"
        return self.live.refusal(event.item, event.time, event.feedback, event.value, event.text, since)

    def _learn(self, events: list[Event]) -> None:
        for event in events:
            self.live.add(event.user, event.item, event.time, event.feedback, event.value, event.text)
        self._remember(events)

    def _remember(self, events: Iterable[Event]) -> None:
        """Knows the events' keys from now on, and forgets the oldest."""
        self.keys.update((event.key, None) for event in events if event.key is not None)
        for key in list(islice(self.keys, max(0, len(self.keys) - KEYS))):
            del self.keys[key]

    async def _on(self, thread: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)


async def _queued(queue: asyncio.Queue, what: Any) -> Any:
    """The answer to ``what``, once its batch is done."""
    answer: asyncio.Future = asyncio.get_running_loop().create_future()
    try:
        queue.put_nowait((what, answer))
    except asyncio.QueueFull:
        raise HTTPException(503, "busy: come again", {"Retry-After": "1"}) from None
    return await answer


async def _waiting(queue: asyncio.Queue, size: Callable[[Any], int]) -> list[tuple[Any, asyncio.Future]]:
    """What waits in the queue, at least one, up to AT_ONCE in size."""
    batch = [await queue.get()]
    total = size(batch[0][0])
    while total < AT_ONCE and not queue.empty():
        batch.append(queue.get_nowait())
        total += size(batch[-1][0])
    return batch


async def _settle(batch: list[tuple[Any, asyncio.Future]], work: Awaitable[Sequence[Any]]) -> None:
    """Gives each of a batch its answer, or all of them the error. One who no longer waits is passed over."""
    waiting = [answer for _, answer in batch]
    try:
        answers = await work
    except Exception as error:
        for answer in waiting:
            if not answer.done():
                answer.set_exception(error)
    else:
        for answer, found in zip(waiting, answers, strict=True):
            if not answer.done():
                answer.set_result(found)


class Guard:
    """Middleware: the bearer token, the size of a body, and what `/metrics` counts."""

    def __init__(self, app: Any, metrics: Metrics, token: str | None) -> None:
        self.app, self.metrics, self.token = app, metrics, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status, seen = time.perf_counter(), 500, 0

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_BYTES:
                raise HTTPException(413, f"found more than {BODY_BYTES:,} bytes, expected at most that")
            return message

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self._allowed(scope):
                await self.app(scope, limited, noted)
            else:
                reply = JSONResponse({"detail": "found no valid bearer token"}, 401, {"WWW-Authenticate": "Bearer"})
                await reply(scope, receive, noted)
        finally:
            path = scope["route"].path if "route" in scope else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    def _allowed(self, scope: Any) -> bool:
        if self.token is None or scope["path"] == "/health":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.token.encode())


def create_app(service: Service, token: str | None) -> FastAPI:
    """The service as an ASGI application. With a ``token`` every path but `/health` asks for it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work) for work in (service.answer_questions(), service.keep_events())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.close()

    app = FastAPI(title="negfast", version=version("negfast"), lifespan=lifespan)
    app.add_middleware(Guard, metrics=service.metrics, token=token)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(OSError)
    async def no_room(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"detail": f"not kept: {error.strerror}"}, 507)

    @app.post("/score")
    async def score(request: ScoreRequest) -> ScoreReply:
        return ScoreReply(scores=await service.score(request))

    @app.post("/predict")
    async def predict(request: PredictRequest) -> PredictReply:
        return await service.predict(request)

    @app.post("/events")
    async def events(request: EventsRequest) -> EventsReply:
        now = int(time.time())
        told = [
            Event(**{**event.model_dump(), "time": now if event.time is None else event.time})
            for event in request.events
        ]
        return await service.add(told)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        live = service.live
        return {"status": "ok", "run": str(service.run.path), "data_until": live.data_until, "events_from": live.since}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def serve_run(run: Path, data: Path | None, events: Path | None, host: str, port: int) -> None:
    """Serves ``run`` over HTTP until SIGTERM or SIGINT; SIGHUP loads it anew, SIGUSR2 restarts the process.

    ``data`` as in `negfast.load`. ``events`` is the event file (`negfast.serve.journal`), made where there is none.
    Beyond the loopback a token is needed: it is read from the environment variable NEGFAST_TOKEN. Raises InputError for
    what is no run, an event file that is damaged or used by another process, an address that is taken, and one beyond
    the loopback without a token.
    """
    token = os.environ.get(TOKEN) or None
    if token is None and host not in LOOPBACK:
        raise InputError(f"--host {host}: others can reach it, but {TOKEN} is not set; expected a token there")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sockets = sockets_of(host, port)
    journal = None if events is None else Journal(events)
    service = Service(lambda: Run(run.resolve(), data), journal)  # a link may name another run by then
    server = Server(create_app(service, token), sockets)
    asyncio.run(_serve(service, server))
    if server.passed:
        start_again(server.passed)


async def _serve(service: Service, server: Server) -> None:
    reloads: set[asyncio.Task] = set()  # a task that nobody holds may be collected

    def reload() -> None:
        reloads.add(task := asyncio.create_task(service.reload()))
        task.add_done_callback(reloads.discard)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reload)
    loop.add_signal_handler(signal.SIGUSR2, server.restart)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    await server.serve()
