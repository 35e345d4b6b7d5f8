"""The page in headless Chromium, in front of a server that says what the test tells it to, when it tells it to."""

import asyncio
import dataclasses
import json
import queue
import socket
import threading
import wave

import fastapi
import numpy as np
import pytest
import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse

from gpt4v_jax.training import workdir
from tests.serve import browser as browser_lib
from tests.serve import fake as fake_lib
from tests.serve.test_look import made, png
from tests.test_evaluate import folder  # noqa: F401

ANSWER = ".answer:last-child "
TOUCHED = "button, input:not(.chip input), textarea, select, summary, .chip"
CONTROLS = ("button", "textbox", "spinbutton", "radio", "combobox", "DisclosureTriangle")
DONE = f"{ANSWER}.again:not([hidden])"


class Fake:
    """/v1/models and the completions of a server whose answers are put into `say`."""

    def __init__(self, trained, key="", **settings):
        self.asked: queue.Queue[dict] = queue.Queue()  # bodies
        self.gone: queue.Queue[bool] = queue.Queue()  # of each stream: whether it was cut
        self.refuse: list[tuple[int, str]] = []  # (status, message) of the next requests
        self.key, self._pieces, self._loop = key, asyncio.Queue(), None
        app = fastapi.FastAPI(dependencies=[fastapi.Depends(self._check)])
        app.add_exception_handler(fastapi.HTTPException, lambda _, e: self._error(e.status_code, e.detail))
        pages = fastapi.FastAPI()
        app.get("/models")(lambda: {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        app.post("/chat/completions")(self._answer)
        app.post("/completions")(self._answer)
        pages.mount("/v1", app)
        pages.mount("/", fake_lib.app(model=trained, keys=(("me", key),) if key else (), **settings))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(pages, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def close(self):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def say(self, *pieces) -> None:
        """Texts; None ends the answer, "broken" ends the connection, a dict is an event as it is."""
        for piece in pieces:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def _check(self, request: fastapi.Request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise fastapi.HTTPException(401, "this server asks for a key")

    @staticmethod
    def _error(status: int, message: str):
        return JSONResponse({"error": {"message": message, "type": "?", "param": None, "code": None}}, status)

    async def _answer(self, request: fastapi.Request):
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        body = await request.json()
        if self.refuse:
            return self._error(*self.refuse.pop(0))
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict):
        def event(value):
            return f"data: {json.dumps(value)}\n\n"

        count, cut = 0, True
        self.asked.put(body)
        try:
            while (piece := await self._pieces.get()) is not None:
                if piece == "broken":
                    return
                text = {"delta": {"content": piece}} if "messages" in body else {"text": piece}
                yield event(piece if isinstance(piece, dict) else {"choices": [{"index": 0, **text}]})
                count += 1
            last = {"delta": {}} if "messages" in body else {"text": ""}
            yield event({"choices": [{"index": 0, **last, "finish_reason": "stop"}]})
            yield event({"choices": [], "usage": {"completion_tokens": count}})
            yield "data: [DONE]\n\n"
            cut = False
        finally:
            self.gone.put(cut)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    made = browser_lib.Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(chromium):
    """The browser, with nothing left of the page before; a test fails where a script did or the policy refused."""
    chromium.problems.clear()
    yield chromium
    problems = [p for p in chromium.problems if "status of 4" not in p and "ERR_INCOMPLETE" not in p]
    assert not problems


@pytest.fixture(scope="module")
def trained(folder):  # noqa: F811
    return workdir.restore(folder)


@pytest.fixture
def serve(page):
    """serve(trained, ...) -> a Fake, and the page open in the browser with its storage empty."""
    fakes = []

    def start(trained, width=1280, height=800, mobile=False, connects=True, **settings):
        fakes.append(fake := Fake(trained, **settings))
        page.open(fake.url, width, height, mobile)
        if connects:
            page.until("document.title === 'tiny' && document.activeElement.id === 'text'")
        return fake

    yield start
    for fake in fakes:
        fake.close()


@pytest.fixture
def scene(tmp_path):
    (tmp_path / "scene.png").write_bytes(png(1))
    return tmp_path / "scene.png"


def ask(page, fake, question: str) -> dict:
    """-> the body that the page sent."""
    page.type(question)
    page.press("Enter")
    return fake.asked.get(timeout=20)


def test_an_answer_streams_and_text_stays_text(page, serve, trained):
    fake = serve(trained)
    evil = '<img src=x onerror="document.title = 1">'
    body = ask(page, fake, evil)
    assert body["messages"] == [{"role": "user", "content": evil}] and body["stream"] and body["model"] == "tiny"
    assert not {"temperature", "top_p", "seed", "stop", "max_tokens"} & set(body), "what nobody set is not sent"
    fake.say("one ")
    page.until(f"document.querySelector('{ANSWER}.said').textContent === 'one '")
    assert page.of("#stop", ".hidden") is False and not page.of(DONE, " !== null")
    fake.say("two é ", evil, None)
    page.there(DONE)
    assert page.of(ANSWER + ".said", ".textContent") == f"one two é {evil}"
    assert page.of(".question p", ".textContent") == evil
    assert page.get("document.querySelectorAll('#log img').length") == 0 and page.get("document.title") == "tiny"
    facts = page.of(ANSWER + ".facts", ".textContent")
    assert facts.startswith("3 tokens · ") and "tokens/s" in facts and facts.endswith("finished")
    assert page.of("#log", ".getAttribute('aria-live')") == "polite"
    body = ask(page, fake, "more")
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == f"one two é {evil}"


@pytest.mark.parametrize("how", ["Escape", "#stop", "#new"])
def test_stop_ends_the_request(how, page, serve, trained):
    fake = serve(trained)
    ask(page, fake, "count")
    fake.say("1 2 3")
    page.until(f"document.querySelector('{ANSWER}.said')?.textContent === '1 2 3'")
    page.press(how) if how == "Escape" else page.click(how)
    assert fake.gone.get(timeout=20) is True, "the server is told, by the connection's end"
    if how == "#new":
        page.until("!document.querySelector('.answer') && !document.getElementById('empty').hidden")
        page.until("document.getElementById('stop').hidden")
    else:
        page.there(DONE)
        assert page.of(ANSWER, ".innerText").startswith("1 2 3")
        assert page.of(ANSWER + ".facts", ".textContent").endswith("stopped")
        body = ask(page, fake, "go on")
        assert body["messages"][1] == {"role": "assistant", "content": "1 2 3"}


def test_answer_again(page, serve, trained):
    fake = serve(trained)
    first = ask(page, fake, "one?")
    fake.say("a", None)
    page.there(DONE)
    page.click(f"{ANSWER}.again")
    assert fake.asked.get(timeout=20) == first
    fake.say("b", None)
    page.there(DONE)
    assert page.get("[...document.querySelectorAll('.said')].map(e => e.textContent)") == ["b"]


@pytest.mark.parametrize("status, message", [(400, "a damaged picture"), (429, "too many wait")])
def test_a_refusal_loses_nothing(status, message, page, serve, trained, scene):
    fake = serve(trained)
    fake.refuse = [(status, message)]
    page.drop(scene)
    page.there("#files img")
    page.type("what is it?")
    page.press("Enter")
    page.there("#error:not([hidden])")
    assert page.of("#error", ".textContent") == message
    assert page.of("#text", ".value") == "what is it?"
    assert [page.of(what, ".childElementCount") for what in ("#files", "#log")] == [1, 0]
    page.press("Enter")
    assert fake.asked.get(timeout=20)["messages"][0]["content"][1] == {"type": "text", "text": "what is it?"}
    assert page.of("#error", ".hidden")


@pytest.mark.parametrize("end, message", [
    ("broken", "The connection ended before the answer did."),
    ({"error": {"message": "the engine failed"}}, "the engine failed"),
], ids=["the connection ends", "an error in the stream"])  # fmt: skip
def test_an_answer_that_breaks_off_is_kept(end, message, page, serve, trained):
    fake = serve(trained)
    ask(page, fake, "say")
    fake.say("half an", end)
    page.there(DONE)
    told = page.get(f"['.said', '.failed'].map(e => document.querySelector('{ANSWER}' + e).textContent)")
    assert told == ["half an", message]


def test_pictures_come_by_drop_by_choice_and_leave(page, serve, trained, scene, tmp_path):
    """What the model does not read, what is too large and what is no medium is left out, and said."""
    fake = serve(trained, max_body=3 * scene.stat().st_size)
    big, song, note = tmp_path / "big.png", tmp_path / "song.wav", tmp_path / "note.txt"
    big.write_bytes(2 * scene.read_bytes())
    song.write_bytes(b"RIFF")
    note.write_text("hello")
    page.drop(scene, big, song, note)
    page.until("document.querySelector('#files img')?.complete")
    error = page.of("#error", ".textContent")
    for told in ("big.png: with it this chat has", "song.wav: this model reads no sound", "note.txt is no picture"):
        assert told in error
    assert page.of("#files img", ".naturalWidth") == 24
    page.choose("#chosen", scene)
    page.until("document.querySelectorAll('#files li').length === 2")
    page.click("#files li:last-child button")
    page.until("document.querySelectorAll('#files li').length === 1")
    body = ask(page, fake, "what is it?")
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR") and text["text"] == "what is it?"
    assert page.of(".question img", ".naturalWidth") == 24


def test_a_picture_is_pasted(page, serve, trained):
    serve(trained)
    page.get("{ const clipboardData = new DataTransfer();"
             "clipboardData.items.add(new File(['x'], 'cut.png', {type: 'image/png'}));"
             "const paste = new ClipboardEvent('paste', {clipboardData, bubbles: true, cancelable: true});"
             "document.querySelector('#text').dispatchEvent(paste); }")  # fmt: skip
    page.until("document.querySelector('#files li')?.textContent.startsWith('cut.png')")
    assert page.of("#send", ".disabled") is False


def test_clips_and_sounds(page, serve, tmp_path):
    fake = serve(made(media=True))
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.zeros(800, np.int16).tobytes())
    (tmp_path / "b.mp4").write_bytes(b"no clip, but called one")
    page.drop(tmp_path / "a.wav", tmp_path / "b.mp4")
    page.until("document.querySelectorAll('#files li').length === 2")
    sound, clip, _ = ask(page, fake, "?")["messages"][0]["content"]
    assert sound["type"] == "input_audio" and sound["input_audio"]["format"] == "wav"
    assert sound["input_audio"]["data"].startswith("UklGR"), "base64 of RIFF, without data:"
    assert clip["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert page.get("[...document.querySelectorAll('.question audio, .question video')].every(e => e.controls)")


def test_where_it_looked(page, serve, trained, scene):
    """The whole way: picture, question, answer, a map; another token and another layer by the arrow keys."""
    fake = serve(trained)
    page.drop(scene)
    page.there("#files img")
    ask(page, fake, "what is it?")
    fake.say("red", " and", None)
    page.there(DONE)
    page.click(f"{ANSWER}.looks")
    page.until("document.querySelector('.look figcaption').textContent")
    caption = "document.querySelector('.look figcaption').textContent"
    before = page.get(caption)
    assert "mean of the layers" in before and "% of the attention is on the picture" in before
    assert page.get("['width', 'height'].map(side => document.querySelector('.look canvas')[side])") == [2, 2]
    boxes = (page.of(what, ".getBoundingClientRect().toJSON()") for what in (".look canvas", ".look img"))
    assert next(boxes) == pytest.approx(next(boxes), abs=1), "the map lies over the picture"
    tokens = page.get("[...document.querySelectorAll('.look .tokens .chip')].map(e => e.textContent)")
    assert "".join(tokens) == "red and"
    page.of(".look .tokens input", ".focus()")
    page.press("ArrowRight")
    page.until(f"{caption} !== {json.dumps(before)}")
    before = page.get(caption)
    page.press("Tab")
    page.press("ArrowRight")
    page.until(f"{caption}.includes('layer 1 of 2')")
    assert page.of(ANSWER + ".looks", ".getAttribute('aria-expanded')") == "true"


def test_by_the_keyboard_alone(page, serve, trained):
    """The order of the Tab key; what has the focus shows it; Shift and Enter is a new line."""
    fake = serve(trained)
    page.type("a")
    page.press("Enter", browser_lib.SHIFT)
    page.type("b")
    assert page.of("#text", ".value") == "a\nb" and fake.asked.empty()
    seen = []
    for _ in range(3):
        page.press("Tab")
        seen.append(page.get("document.activeElement.id || document.activeElement.tagName"))
        style = "getComputedStyle(document.activeElement)"
        assert page.get(f"{style}.outlineStyle !== 'none' && parseFloat({style}.outlineWidth) >= 2")
    assert seen == ["attach", "send", "SUMMARY"]
    page.of("summary", ".focus()")
    page.press("Enter")
    page.until("document.getElementById('sampling').open")
    page.press("Tab")
    assert page.get("document.activeElement.name") == "temperature"
    page.type("0.5")
    page.press("Tab", browser_lib.SHIFT)
    page.press("Tab", browser_lib.SHIFT)
    assert page.get("document.activeElement.id") == "send"
    page.press("Enter")
    assert fake.asked.get(timeout=20)["temperature"] == 0.5


def test_sampling_is_sent_said_and_remembered(page, serve, trained):
    fake = serve(trained)
    page.click("#sampling summary")
    for name, value in (("temperature", "0.7"), ("top_k", "5"), ("seed", "3"), ("stop", "x\\n")):
        page.get(f"document.querySelector('[name={name}]').focus()")
        page.type(value)
    page.open(fake.url)
    page.until("document.activeElement.id === 'text'")
    assert page.of("#set", ".textContent") == "temperature 0.7 · top k 5 · seed 3 · stop x\\n"
    body = ask(page, fake, "?")
    assert (body["temperature"], body["top_k"], body["seed"], body["stop"]) == (0.7, 5, 3, ["x\n"])
    fake.say("a", None)
    page.there(DONE)
    page.get("document.querySelector('[name=temperature]').value = '7'")
    page.type("too hot")
    page.press("Enter")
    page.until("document.getElementById('sampling').open && document.activeElement.name === 'temperature'")
    assert fake.asked.empty() and page.of("#text", ".value") == "too hot"
    page.click("#reset")
    page.press("Escape")
    page.of("#text", ".focus()")
    page.press("Enter")
    assert not {"temperature", "top_k", "seed", "stop"} & set(fake.asked.get(timeout=20))


def test_a_key_is_asked_for_and_kept_for_the_tab(page, serve, trained):
    fake = serve(trained, connects=False, key="secret")
    page.there("#key:not([hidden])")
    assert "a key is needed" in page.of("#hint", ".textContent")
    page.of("#secret", ".focus()")
    page.type("secret")
    page.press("Enter")
    page.until("document.title === 'tiny' && document.getElementById('key').hidden")
    assert ask(page, fake, "hello")["messages"]
    assert page.get("sessionStorage.getItem('key')") == "secret"
    assert not page.get("JSON.stringify(localStorage).includes('secret')")


@pytest.mark.parametrize("width, height", [(360, 640), (390, 844)])
def test_on_a_phone(width, height, page, serve, trained, scene):
    """Nothing to scroll sideways, whatever is said; what is touched is at least 44 pixels wide and high."""
    fake = serve(trained, width, height, True)
    page.drop(scene)
    page.there("#files img")
    ask(page, fake, "w" * 50)
    fake.say("m" * 45, " <b>", None)
    page.there(DONE)
    page.click(f"{ANSWER}.looks")
    page.until("document.querySelector('.look figcaption').textContent")
    page.click("#sampling summary")
    page.drop(scene)
    page.there("#files img")
    wide = "[...document.querySelectorAll('html, body, main, footer, .question, .said')]"
    assert page.get(f"{wide}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className || e.tagName)") == []
    assert page.get("document.documentElement.scrollWidth") == width
    small = page.get(f"[...document.querySelectorAll('{TOUCHED}')].filter(e => {{ const b = e.getBoundingClientRect(); "
                     "return b.width && (b.width < 44 || b.height < 44); }).map(e => e.outerHTML)")  # fmt: skip
    assert small == []
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in CONTROLS]
    unnamed = [node for node in controls if not node.get("name", {}).get("value")]
    assert len(controls) > 20
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme, page, serve, trained):
    """WCAG 2.1 AA: 4.5 of text, 3 of what a control is known by."""
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    serve(trained)
    names = ("page", "card", "tint", "ink", "faint", "wrong", "accent", "on", "edge")
    style = "getComputedStyle(document.documentElement)"
    colour = {name: page.get(f"{style}.getPropertyValue('--{name}')") for name in names}

    def luminance(name):
        c = np.array([int(colour[name].strip()[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card", "tint"):
        assert min(contrast(ink, ground) for ink in ("ink", "faint", "wrong")) >= 4.5
        assert contrast("accent", ground) >= 3
    assert contrast("accent", "on") >= 4.5 and min(contrast("edge", g) for g in ("page", "card")) >= 3
    assert (luminance("page") < 0.1) == (scheme == "dark")


def test_a_model_of_plain_text_goes_on(page, serve, trained):
    fake = serve(dataclasses.replace(trained, texts=(trained.run.data.name,)))
    assert page.of("#attach", ".hidden")
    body = ask(page, fake, "Once ")
    assert body["prompt"] == "Once " and "messages" not in body
    fake.say("upon", None)
    page.there(DONE)
    assert page.of(ANSWER + ".said", ".textContent") == "Once upon"
    page.click(f"{ANSWER}.on")
    assert fake.asked.get(timeout=20)["prompt"] == "Once upon"
