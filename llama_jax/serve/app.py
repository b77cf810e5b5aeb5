"""The routes: HTTP in, requests to the engine, JSON or a stream out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve import body, cors, schema, tokenize
from llama_jax.serve.answers import EventStream, collected, told
from llama_jax.serve.bodies import Bodies
from llama_jax.serve.chat_responses import reply_of
from llama_jax.serve.constrain import asks_for_grammar
from llama_jax.serve.embeddings import Embeddings
from llama_jax.serve.errors import CLIENT_GONE, ApiError, json_response, large_response
from llama_jax.serve.feed import ClientGoneError, Feed, full, while_connected
from llama_jax.serve.gate import Gate, Status, owner_of
from llama_jax.serve.metrics import CONTENT_TYPE, Metrics
from llama_jax.serve.responses import embedding_list
from llama_jax.serve.schema import Ask
from llama_jax.serve.served import Limits, Served
from llama_jax.serve.threads import Threads

_INLINE_BYTES = 8192
"""Bodies up to this size are read on the event loop; longer ones may take a while."""
_COMPILING = 2
"""Grammars that are compiled at a time."""
_SHORT, _LONG = 4, 2
"""Short bodies whose chat template runs, and long bodies, that are read at a time."""
_END_SECONDS = 5.0
"""For threads, when the server ends."""
_PAGE = {
    'index.html': 'text/html',
    'page.css': 'text/css',
    'page.js': 'text/javascript',
    'tokens.js': 'text/javascript',
}
# The page loads its own files, asks this server, and nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """What the routes share: the model, counts, and the streams that are open."""

    def __init__(self, served: Served, limits: Limits):
        self.served, self.limits = served, limits
        self.metrics = Metrics()
        self.closing = False
        self._feeds: set[Feed] = set()
        self._compiling = Threads(_COMPILING)
        self._checking = {'short': Threads(_SHORT), 'long': Threads(_LONG)}
        self._bodies = Bodies(limits)
        self._embeddings = Embeddings(served.engine, waiting=limits.embeddings_waiting)

    @property
    def status(self) -> Status:
        if self.closing:
            return 'closing'
        return 'ok' if self.served.engine.alive else 'stopped'

    def close_streams(self) -> None:
        """What still runs ends now, as 'cancelled'; nothing new begins."""
        self.closing = True
        for feed in self._feeds:
            feed.cancel()

    async def end_threads(self) -> None:
        """Those that still compute; not for ever."""
        pools = (self._embeddings.threads, self._compiling, *self._checking.values())
        await asyncio.gather(
            *(threads.end(seconds=_END_SECONDS) for threads in pools), return_exceptions=True
        )

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, schema.completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, schema.chat)

    async def _generate(
        self,
        request: Request,
        check: Callable[[Served, Limits, Mapping[str, Any], str], Ask],
    ) -> Response:
        owner = owner_of(request.scope)
        ask = await self._read(
            request, lambda fields: check(self.served, self.limits, fields, owner)
        )
        feed = Feed(self.served.engine, self.metrics)
        reply = reply_of(self.served, ask)
        self._feeds.add(feed)
        try:
            await feed.submit(ask.requests)
            if ask.stream:
                return EventStream(told(feed, reply, ask), lambda: self._done(feed))
        except BaseException:
            self._done(feed)
            raise
        try:
            return await while_connected(collected(feed, reply), request.receive)
        finally:
            self._done(feed)

    def _done(self, feed: Feed) -> None:
        feed.cancel()
        self._feeds.discard(feed)

    async def embeddings(self, request: Request) -> Response:
        owner = owner_of(request.scope)
        ask = await self._read(
            request, lambda fields: schema.embeddings(self.served, self.limits, fields)
        )
        made = self._embeddings(ask.inputs, owner=owner, deadline=ask.deadline)
        vectors = await while_connected(made, request.receive)
        return await large_response(
            lambda: embedding_list(self.served, vectors, ask.inputs, as_base64=ask.base64)
        )

    async def _read(self, request: Request, check: Callable[[dict[str, Any]], Any]) -> Any:
        async with self._bodies.read(request) as data:
            fields = None
            if len(data) <= _INLINE_BYTES:
                fields = body.parse(data)
                if 'messages' not in fields and not self._compiles(fields):
                    return check(fields)
            made = self._apart(data, fields, check, owner_of(request.scope))
            return await while_connected(made, request.receive)

    async def _apart(
        self,
        data: bytes,
        fields: dict[str, Any] | None,
        check: Callable[[dict[str, Any]], Any],
        owner: str,
    ) -> Any:
        """Checks a body on another thread: it is long, or the template of the model or the compiler
        of grammars may take its time."""
        threads = self._checking['long' if fields is None else 'short']

        async def on_a_thread(work: Callable[[], Any]) -> Any:
            try:
                await threads.wait(owner, seconds=self.limits.body_seconds)
            except TimeoutError:
                raise full('requests of others are being read') from None
            return await threads.run(work)

        if fields is None:
            fields = await on_a_thread(lambda: body.parse(data))
        if self._compiles(fields):
            return await self._compiled(lambda: check(fields), owner)
        return await on_a_thread(lambda: check(fields))

    def _compiles(self, fields: Mapping[str, Any]) -> bool:
        return self.served.make_grammar is not None and asks_for_grammar(fields)

    async def _compiled(self, check: Callable[[], Any], owner: str) -> Any:
        """There are grammars that take for ever, and no way to tell them by their looks."""
        seconds = self.limits.grammar_seconds
        try:
            await self._compiling.wait(owner, seconds=seconds)
        except TimeoutError:
            raise full('grammars of others are being compiled') from None
        try:
            return await self._compiling.run(check, seconds=seconds)
        except TimeoutError:
            raise ApiError(
                400, f'the grammar takes more than {seconds:g} s to compile: simplify it'
            ) from None

    async def tokenize(self, request: Request) -> Response:
        return json_response(await self._read(request, partial(tokenize.tokenized, self.served)))

    async def detokenize(self, request: Request) -> Response:
        return json_response(await self._read(request, partial(tokenize.detokenized, self.served)))

    async def tokenizer_info(self, request: Request) -> Response:
        return json_response(tokenize.tokenizer_info(self.served))

    async def models(self, request: Request) -> Response:
        return json_response({'object': 'list', 'data': [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params['name']
        if name != self.served.name:
            raise ApiError(
                404, f'the model {body.shown(name)} is not served here', code='model_not_found'
            )
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        served = self.served
        return {
            'id': served.name,
            'object': 'model',
            'created': served.created,
            'owned_by': 'llama_jax',
            'length': served.engine.length,
            'vocabulary': served.engine.config.ids,
            'chat': served.chat is not None,
            'grammars': served.make_grammar is not None,
            'infill': served.infill is not None,
        }

    async def health(self, request: Request) -> Response:
        status = self.status
        return json_response({'status': status}, status=200 if status == 'ok' else 503)

    async def prometheus(self, request: Request) -> Response:
        text = self.metrics.text(self.served.engine.stats())
        return Response(text, headers={'content-type': CONTENT_TYPE})


def build(
    served: Served,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    origins: Sequence[str] = (),
) -> Starlette:
    """The application; `app.state.service` is its Service. With `keys`, /v1 asks for one of them.
    Pages of `origins` may ask it, besides its own.

    Closes the engine when it shuts down.
    """
    service = Service(served, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close_streams()
        await service.end_threads()
        await asyncio.to_thread(served.engine.close)

    def post(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, endpoint, methods=['POST'])

    def get(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, endpoint, methods=['GET'])

    app = Starlette(
        routes=[
            post('/v1/completions', service.completions),
            post('/v1/chat/completions', service.chat),
            post('/v1/embeddings', service.embeddings),
            post('/tokenize', service.tokenize),
            post('/detokenize', service.detokenize),
            get('/tokenizer_info', service.tokenizer_info),
            get('/v1/models', service.models),
            get('/v1/models/{name:path}', service.model),
            get('/health', service.health),
            get('/metrics', service.prometheus),
            *_page_routes(),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientGoneError: _gone,
            ClientDisconnect: _gone,
            Exception: _failure,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.add_middleware(Gate, service=service, keys=tuple(keys))
    if origins:
        cors.allow(app, origins)  # around the gate: browsers ask first, without the key
    return app


def _page_routes() -> list[Route]:
    """The page at / and its files, read once."""
    folder = resources.files('llama_jax.serve') / 'page'

    def route(name: str, kind: str) -> Route:
        data = (folder / name).read_bytes()
        headers = {
            'content-security-policy': _POLICY,
            'x-content-type-options': 'nosniff',
            'referrer-policy': 'no-referrer',
            'cache-control': 'no-cache',
        }

        async def endpoint(request: Request) -> Response:
            return Response(data, headers=headers, media_type=kind)

        return Route('/' if name == 'index.html' else f'/{name}', endpoint, methods=['GET'])

    return [route(name, kind) for name, kind in _PAGE.items()]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Those of the router: no such path, another method."""
    assert isinstance(error, HTTPException)
    what = {
        404: f'there is no {body.shown(request.url.path)} here',
        405: f'{request.method} is not allowed here',
    }
    message = what.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _failure(request: Request, error: Exception) -> Response:
    return ApiError(500, 'the server failed; its log tells more', code='internal_error').response()
