"""The HTTP server: OpenAI's endpoints over one trained model. docs/serve.md is for who uses it."""

import contextlib
import secrets
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response

from gpt4v_jax.serve import completions, errors, look, schema, server, speech, tokens, vectors
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.gate import Gate
from gpt4v_jax.serve.server import Server, Settings
from gpt4v_jax.serve.wire import Reply
from gpt4v_jax.training.workdir import Trained

router = APIRouter()
MOST_TEXTS = 256  # of a request to /v1/moderations


def create(trained: Trained, engine, settings: Settings) -> FastAPI:
    """-> the app; app.state.server is what its endpoints share. Whoever made the engine closes it."""
    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.server.close()

    # No pages of the schema: they would load scripts from elsewhere.
    app = FastAPI(title="gpt4v_jax", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = Server(trained, engine, settings)
    app.add_exception_handler(HTTPException, errors.handle)
    app.add_middleware(Gate, server=app.state.server)
    for part in (router, completions.router, vectors.router, speech.router, tokens.router, look.router):
        app.include_router(part)
    if settings.moderation is not None:
        app.add_api_route("/v1/moderations", moderations, methods=["POST"])
    return app


@router.get("/v1/models")
async def models(http: Http) -> Response:
    return Reply({"object": "list", "data": [server.of(http).card]})


@router.get("/v1/models/{name:path}")
async def model(http: Http, name: str) -> Response:
    server.of(http).check_model(name)
    return Reply(server.of(http).card)


@router.get("/health")
async def health(http: Http) -> Response:
    if server.of(http).closing:
        raise errors.closing()
    return Reply({"status": "ok"})


@router.get("/metrics")
async def metrics(http: Http) -> Response:
    return Response(server.of(http).metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def moderations(http: Http) -> Response:
    """What the server's own filter says of texts."""
    here = server.of(http)
    given = await here.read(http, schema.MODERATION)
    value = given.get("input")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise schema.bad("input", value, "a text, or a list of texts")
    if len(texts) > MOST_TEXTS:
        raise ApiError(f"input has {len(texts)} texts: give at most {MOST_TEXTS}", "input", "invalid_value")
    here.check_lengths("input", texts)
    moderation, results = here.settings.moderation, []
    for text in texts:
        scores = await here.in_thread(moderation.scores, text)
        flags = {name: score >= moderation.thresholds[name] for name, score in scores.items()}
        results.append({"flagged": any(flags.values()), "categories": flags, "category_scores": scores})
    return Reply({"id": "modr-" + secrets.token_hex(12), "model": here.settings.name, "results": results})
