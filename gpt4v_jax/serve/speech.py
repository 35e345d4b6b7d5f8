"""POST /v1/audio/transcriptions: a sound and a question about it, as a form."""

import math
import re

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import PlainTextResponse, Response

from gpt4v_jax.generate import prompts, sample
from gpt4v_jax.serve import schema, server, stream
from gpt4v_jax.serve.errors import ApiError, shown
from gpt4v_jax.serve.follow import Following
from gpt4v_jax.serve.server import Server
from gpt4v_jax.serve.stream import Prompt
from gpt4v_jax.serve.wire import Reply, while_there

FIELDS = schema.NAME | {"prompt": schema.text, "response_format": schema.one_of("json", "text"),
                        "temperature": schema.text, "language": schema.text,
                        "stream": schema.one_of("false")}  # fmt: skip

CHARSET = re.compile(r"""charset\s*=\s*["']?([^"';\s]*)""", re.IGNORECASE)
FIELD = 2**16  # bytes of a field that is no file

router = APIRouter()


@router.post("/v1/audio/transcriptions")
async def transcriptions(http: Http) -> Response:
    here = server.of(http)
    kind = http.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise ApiError(f"content-type is {shown(kind)}: send multipart/form-data", None, "content_type", 415)
    charset = CHARSET.search(kind)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):  # some take quadratic time to decode
        raise ApiError(f"content-type has the charset {shown(charset[1])}: send utf-8", None, "content_type", 415)
    try:
        form = await http.form(max_files=1, max_fields=20, max_part_size=FIELD)
    except HTTPException as error:  # Starlette's, of a form that is none
        raise ApiError(f"the form cannot be read: {error.detail}", None, "invalid_form") from None
    try:
        given, file = fields(form), form.get("file")
        here.check_model(given.get("model", given.get("engine")))
        if not isinstance(file, UploadFile):
            raise ApiError("file is missing: a sound, as a file of the form", "file")
        sound, text = await file.read(), given.get("prompt", here.settings.transcribe)
    finally:
        await form.close()
    wish = schema.Asked(sample.Sampling(temperature(given.get("temperature", "0"))))

    async def heard() -> dict:
        await here.check_text(text, "prompt")
        asked = await here.in_thread(question, here, text, sound)
        requests = schema.requests(wish, asked.document, asked.read, here.trained.layout.context, "file",
                                   user=http.state.user, seconds=here.settings.seconds)  # fmt: skip
        with Following(here, requests) as answers:
            await answers.submit()
            return await stream.whole(here, http, stream.Form(here, wish, [asked]), answers)

    body = await while_there(http.receive, heard())
    said = body["choices"][0]["text"]
    if given.get("response_format") == "text":
        return PlainTextResponse(said.encode("utf-8", "replace") + b"\n")
    usage = {"type": "tokens", "input_tokens": body["usage"]["prompt_tokens"],
             "output_tokens": body["usage"]["completion_tokens"], "total_tokens": body["usage"]["total_tokens"]}
    return Reply({"text": said, "usage": usage})


def fields(form: FormData) -> dict:
    return schema.read({key: value for key, value in form.items() if key != "file"}, FIELDS)


def temperature(value: str) -> float:
    """A form has texts alone."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return schema.number(0, 1)("temperature", number)


def question(here: Server, text: str, sound: bytes) -> Prompt:
    with schema.naming("file", "invalid_medium"):
        here.settings.guard.check("audio", sound, here.trained.layout)
        media, read = prompts.attach(here.trained.layout, [("audio", sound)])
        return Prompt(prompts.prompt(here.trained, text, media), read, text)
