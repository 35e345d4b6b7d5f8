"""The page at /, and what an answer looked at in a picture: POST /look.

The page is plain files beside this one. It talks to the standard endpoints (/v1/models, /v1/chat/completions,
/v1/completions) and to the two of this file; its files come with a policy that forbids everything from elsewhere.
"""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import fastapi
import jax
import numpy as np
from fastapi.concurrency import run_in_threadpool

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import prompts
from gpt4v_jax.interpret import attention
from gpt4v_jax.training.workdir import Trained

PromptOf = Callable[[list[dict]], Awaitable[tuple[chat.Document, prompts.Read | None]]]
FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "look.js": "text/javascript",
         "page.svg": "image/svg+xml"}
MOST_BYTES = 20 * 2**20  # of a request's body, unless the server says something else
FILES_SHARE = 0.74  # of a body: base64 is 4/3 of a file, and some text goes with it
HEADERS = {
    # blob: are the previews of files that the user has chosen.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; object-src 'none'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and not sent again while its ETag is the same
}  # fmt: skip


def router(trained: Trained, prompt_of: PromptOf, checks: Sequence[Callable] = (), most_bytes: int = MOST_BYTES):
    """-> an APIRouter: GET / with its parts, which anybody may read, GET /look/info and POST /look.

    prompt_of: messages of a chat completion -> (the prompt, what reads its media), as chat.fetched and chat.prompt make
    them. checks: FastAPI dependencies of /look and /look/info, such as the one that asks for a key. most_bytes:
    of a request's body, in which the files of a whole chat travel.
    """
    made, one = fastapi.APIRouter(include_in_schema=False), asyncio.Lock()
    for name, kind in FILES.items():
        path = Path(__file__).with_name(name or "page.html")
        made.add_api_route(f"/{name}", _file(path, kind), methods=["GET", "HEAD"])
    known = info(trained) | {"most_bytes": int(FILES_SHARE * most_bytes)}
    guarded = [fastapi.Depends(check) for check in checks]

    @made.get("/look/info", dependencies=guarded)
    async def look_info() -> dict:
        return known

    @made.post("/look", dependencies=guarded)
    async def look(request: fastapi.Request):
        try:
            messages, *ask = _asked(await request.body())
            if reason := why_not(trained):
                raise config.InputError(reason)
            prompt, read = await prompt_of(messages)
            async with one:  # a forward pass of the whole conversation: one at a time, beside the answers
                return await run_in_threadpool(looked, trained, prompt, read, *ask)
        except config.InputError as error:
            body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
            return fastapi.responses.JSONResponse({"error": body}, 400)

    return made


def _file(path: Path, kind: str):
    def send(request: fastapi.Request) -> fastapi.Response:
        data = path.read_bytes()
        headers = HEADERS | {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return fastapi.Response(status_code=304, headers=headers)
        return fastapi.Response(data, media_type=kind, headers=headers)

    return send


def info(trained: Trained) -> dict:
    """-> what the page asks before it shows anything: {chats, modalities, context, attention: "" or why there is
    none}."""
    reads = [name for name in batch_lib.MEDIA if trained.chats and trained.layout.reads(name)]
    return {"chats": trained.chats, "modalities": reads, "context": trained.layout.context,
            "attention": why_not(trained)}  # fmt: skip


def why_not(trained: Trained) -> str:
    """-> why there is no attention over pictures; "": there is."""
    if not trained.chats:
        return "This model goes on with plain text: there is no picture to look at."
    if not trained.layout.reads("image"):
        return "This model reads no pictures."
    if trained.layout.tokens:
        return (f"A {trained.run.model.fusion.kind} stands between picture and text: what the text attends to are its "
                f"{trained.layout.tokens} vectors, which have no place in the picture.")  # fmt: skip
    if trained.run.model.decoder.buckets and trained.layout.place == "stream":
        return f"No map: {attention.RELATIVE}."
    return ""


def _asked(data: bytes) -> tuple[list[dict], str | list[int], int, int]:
    """-> (messages, answer, token, picture) of a request's body."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        body = None
    if not isinstance(body, dict):
        raise config.InputError("the body must be a JSON object with messages, answer and token")
    messages, answer = body.get("messages"), body.get("answer")
    if not isinstance(messages, list) or not messages:
        raise config.InputError("messages: give those of the chat completion, up to the question")
    of_ids = isinstance(answer, list) and all(type(id) is int for id in answer)
    if not answer or not (isinstance(answer, str) or of_ids):
        raise config.InputError(f"answer={answer!r:.80}: give its text, or the ids of its tokens")
    numbers = [body.get(name, 0) for name in ("token", "picture")]
    for name, number in zip(("token", "picture"), numbers, strict=True):
        if type(number) is not int or number < 0:
            raise config.InputError(f"{name}={number!r:.80} must be a whole number, 0 for the first")
    return messages, answer, *numbers


def looked(trained: Trained, prompt: chat.Document, read, answer: str | list[int], token: int, picture: int) -> dict:
    """-> {tokens: texts of the answer's tokens, token, picture, pictures: how many there are, layers, rows, columns,
    maps [layers, rows, columns]: where the model looked when it chose that token (the attention of the position before
    it, mean over heads; a map's sum is the share that the picture gets), resize: config.Image's, covered: the (height,
    width) that the patches cover, as shares of what is resized}. Raises InputError."""
    ids = trained.tokenizer.encode(answer) if isinstance(answer, str) else answer
    if token >= len(ids):
        raise config.InputError(f"token={token}: the answer has {len(ids)} tokens, counted from 0")
    if len(ids) + len(prompt) > trained.layout.context or len(prompt.source) > trained.layout.source:
        raise config.InputError(f"{len(prompt) + len(prompt.source)} positions of prompt and {len(ids)} of answer: "
                                "more than this model reads, begin a new chat")
    if odd := [id for id in ids if not 0 <= id < trained.run.model.vocab]:
        raise config.InputError(f"answer has the id {odd[0]}, outside the vocabulary of {trained.run.model.vocab}")
    shown = [medium for _, medium in prompt.media if medium.modality == "image"]
    if picture >= len(shown):
        raise config.InputError(f"picture={picture}: these messages have {len(shown)}, counted from 0")
    whole = _with(prompt, ids[:token])
    with jax.set_mesh(trained.mesh):  # a mesh is set for one thread
        maps = attention.over_picture(trained, whole, read, len(whole) - 1, picture)
    c, view = trained.layout.image, trained.layout.views("image", shown[picture].shape)[0]
    part = 1 if c.resize == "native" else c.grid * c.patch / c.size
    beside = zip(maps.shape[1:], trained.layout.box("image")[1:], view.grid[1:], strict=True)
    return {
        "tokens": pieces(trained, ids), "token": token, "picture": picture, "pictures": len(shown),
        "layers": len(maps), "rows": maps.shape[1], "columns": maps.shape[2],
        "maps": np.round(maps.astype(float), 5).tolist(), "resize": c.resize,
        "covered": [part * rows * m / of for rows, m, of in beside],
    }  # fmt: skip


def _with(prompt: chat.Document, ids: Sequence[int]) -> chat.Document:
    """-> the prompt and the beginning of its answer."""
    more = len(ids)
    return dataclasses.replace(
        prompt, tokens=np.append(prompt.tokens, np.array(ids, np.int32)),
        target=np.append(prompt.target, np.zeros(more, np.int32)),
        weight=np.append(prompt.weight, np.zeros(more, np.float32)), ar=np.append(prompt.ar, np.ones(more, bool)),
        trained=None,
    )  # fmt: skip


def pieces(trained: Trained, ids: Sequence[int]) -> list[str]:
    """-> the text of each token; joined they are the answer. Of a character in several tokens the last one has it."""
    told, so_far = [], ""
    for n in range(1, len(ids) + 1):
        text = trained.tokenizer.decode(ids[:n])
        kept = text if n == len(ids) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        told.append(kept[len(so_far) :])
        so_far = max(so_far, kept, key=len)
    return told
