"""POST /tokenize, /detokenize and GET /tokenizer_info, in vLLM's shapes; tools of evaluation read them."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from gpt4v_jax.serve import chat, schema, server, shapes
from gpt4v_jax.serve.errors import ApiError
from gpt4v_jax.serve.server import Server
from gpt4v_jax.serve.wire import Reply, while_there

router = APIRouter()


@router.post("/tokenize")
async def tokenize(http: Http) -> Response:
    """A text's tokens, or those of a conversation as /v1/chat/completions lays it."""
    here = server.of(http)
    given = await here.read(http, schema.TOKENIZE)
    if ("prompt" in given) == ("messages" in given):
        raise ApiError("give either prompt, a text, or messages", "prompt")
    ids = await while_there(http.receive, _ids(here, given))
    names = shapes.names_of(here.trained.tokenizer)
    strings = [names.text(id) for id in ids] if given.get("return_token_strs") else None
    return Reply({"count": len(ids), "max_model_len": here.trained.layout.context, "tokens": ids,
                  "token_strs": strings})  # fmt: skip


async def _ids(here: Server, given: dict[str, Any]) -> list[int]:
    if "messages" in given:
        turns = await here.in_thread(chat.turns, given["messages"], here.settings.max_media)
        here.check_lengths("messages", chat.texts(turns))
        return (await chat.prompt(here, turns))[0].tokens.tolist()
    tokenizer = here.trained.tokenizer
    here.check_lengths("prompt", [given["prompt"]])
    with schema.naming("prompt"):
        return await here.in_thread(
            tokenizer.prompt if given.get("add_special_tokens", True) else tokenizer.encode, given["prompt"]
        )


@router.post("/detokenize")
async def detokenize(http: Http) -> Response:
    here = server.of(http)
    ids = (await here.read(http, schema.DETOKENIZE)).get("tokens")
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise schema.bad("tokens", ids, "a list of token ids")
    tokenizer, vocab = here.trained.tokenizer, here.trained.run.model.vocab
    if odd := next((id for id in ids if not 0 <= id < vocab), None):
        raise ApiError(f"tokens has {odd}: the vocabulary has 0 to {vocab - 1}", "tokens", "invalid_value")
    return Reply({"prompt": await here.in_thread(tokenizer.decode, ids)})


@router.get("/tokenizer_info")
async def tokenizer_info(http: Http) -> Response:
    trained = server.of(http).trained
    tokenizer = trained.tokenizer
    end = tokenizer.token(tokenizer.ends[0]) if tokenizer.ends else None
    return Reply({
        "tokenizer_class": type(tokenizer.inner.model).__name__, "vocab_size": tokenizer.vocab,
        "model_max_length": trained.layout.context, "bos_token": None, "eos_token": end,
        "pad_token": "<pad>" if "<pad>" in tokenizer.special else end, "unk_token": None, "chat_template": None,
        "special_tokens": tokenizer.special,
    })  # fmt: skip
