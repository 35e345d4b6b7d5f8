"""The page at /, and what an answer looked at in a picture: POST /look.

The page is plain files beside this one. It talks to the standard endpoints (/v1/models, /v1/chat/completions,
/v1/completions) and to the two of this file; its files come with a policy that forbids everything from elsewhere.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data.chat import Document
from gpt4v_jax.interpret import attention
from gpt4v_jax.serve import chat, schema, server
from gpt4v_jax.serve.server import Server
from gpt4v_jax.serve.wire import Reply, while_there
from gpt4v_jax.training.workdir import Trained

FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "look.js": "text/javascript",
         "page.svg": "image/svg+xml"}
FILES_SHARE = 0.74  # of a body: base64 is 4/3 of a file, and some text goes with it
HEADERS = {
    # blob: are the previews of files that the user has chosen.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; object-src 'none'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and not sent again while its ETag is the same
}  # fmt: skip

router = APIRouter(include_in_schema=False)


@router.get("/look/info")
async def look_info(http: Http) -> Response:
    here = server.of(http)
    return Reply(info(here.trained) | {"most_bytes": int(FILES_SHARE * here.settings.max_body)})


@router.post("/look")
async def look(http: Http) -> Response:
    here = server.of(http)
    given = await here.read(http, schema.LOOK)
    if reason := why_not(here.trained):
        raise config.InputError(reason)
    answer = given.get("answer")
    of_ids = isinstance(answer, list) and all(type(id) is int for id in answer)
    if not answer or not (isinstance(answer, str) or of_ids):
        raise schema.bad("answer", answer, "a text, or the ids of its tokens")
    return Reply(await while_there(http.receive, _found(here, given, answer)))


async def _found(here: Server, given: dict[str, Any], answer: str | list[int]) -> dict[str, Any]:
    turns = await here.in_thread(chat.turns, given.get("messages"), here.settings.max_media)
    here.check_lengths("messages", chat.texts(turns))
    here.check_lengths("answer", [answer])
    async with here.beside():
        prompt, read = await chat.prompt(here, turns)
        where = given.get("token", 0), given.get("picture", 0)
        return await here.in_turn(looked, here.trained, prompt, read, answer, *where)


def _file(path: Path, kind: str):
    def send(http: Http) -> Response:
        data = path.read_bytes()
        headers = HEADERS | {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        if http.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return send


for name, kind in FILES.items():
    path = Path(__file__).with_name(name or "page.html")
    router.add_api_route(f"/{name}", _file(path, kind), methods=["GET", "HEAD"])


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


def looked(trained: Trained, prompt: Document, read, answer: str | list[int], token: int, picture: int) -> dict:
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


def _with(prompt: Document, ids: Sequence[int]) -> Document:
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
