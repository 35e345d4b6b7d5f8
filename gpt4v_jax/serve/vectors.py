"""POST /v1/embeddings."""

import base64

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from gpt4v_jax.data import chat
from gpt4v_jax.generate import embed
from gpt4v_jax.serve import schema, server
from gpt4v_jax.serve.completions import known_ids, several
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.server import Server
from gpt4v_jax.serve.wire import Reply, while_there
from gpt4v_jax.training.workdir import Trained

MOST = 2048  # texts of a request, as OpenAI has it

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(http: Http) -> Response:
    here = server.of(http)
    given = await here.read(http, schema.EMBEDDING)
    asked = several("input", given.get("input"))
    if len(asked) > MOST:
        raise ApiError(f"input has {len(asked)} texts: give at most {MOST}", "input", "invalid_value")
    here.check_lengths("input", asked)
    ids, found = await while_there(http.receive, _embedded(here, asked))
    usage = {"prompt_tokens": ids, "total_tokens": ids}
    here.count(http, usage | {"completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}})
    data = [{"object": "embedding", "index": i, "embedding": shown(vector, given.get("encoding_format", "float"))}
            for i, vector in enumerate(found)]  # fmt: skip
    return Reply({"object": "list", "data": data, "model": here.settings.name, "usage": usage})


def shown(vector: np.ndarray, form: str) -> list[float] | str:
    """base64: of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


async def _embedded(here: Server, asked: list[str | list[int]]) -> tuple[int, list[np.ndarray]]:
    """-> (how many tokens were read, a vector for each)."""
    found: dict[int, np.ndarray] = {}
    async with here.beside():
        count, documents = await here.in_thread(_documents, here.trained, asked)
        for part in embed.parts(documents):  # between them others have their turns
            found |= zip(part, await here.in_turn(embed.embed, here.trained, [documents[i] for i in part]), strict=True)
    return count, [found[i] for i in range(len(documents))]


def _documents(trained: Trained, asked: list[str | list[int]]) -> tuple[int, list[chat.Document]]:
    with schema.naming("input"):
        ids = [known_ids(trained, one, "input") if isinstance(one, list) else trained.tokenizer.encode(one)
               for one in asked]  # fmt: skip
        return sum(map(len, ids)), [embed.document(trained, one) for one in ids]
