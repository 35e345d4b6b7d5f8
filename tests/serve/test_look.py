"""The page's files and their headers; POST /look against the attention that it tells of."""

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.data import tokenizer as tokenizer_lib
from gpt4v_jax.generate import prompts
from gpt4v_jax.interpret import attention
from gpt4v_jax.serve import look
from gpt4v_jax.training import workdir
from tests import tiny
from tests.serve import fake
from tests.test_evaluate import folder  # noqa: F401


def png(seed: int, size=(24, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def asked(question: str, *pictures: bytes) -> dict:
    urls = ["data:image/png;base64," + base64.b64encode(data).decode() for data in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}] if parts else question}


def client(trained, **settings) -> TestClient:
    return fake.client(model=trained, **settings)


@pytest.fixture(scope="module")
def trained(folder):  # noqa: F811
    return workdir.restore(folder)


def made(**values) -> workdir.Trained:
    """A model that has learnt nothing, and a tokenizer of bytes."""
    tokenizer = tokenizer_lib.train("byte", (), 0)
    model = dataclasses.replace(tiny.make_config(**{"context": 64} | values), vocab=tokenizer.vocab)
    module, params = tiny.make_model(model)
    run = config.Config(model=module.config, data=dataclasses.replace(tiny.DATA, name="digits_world/small"))
    return workdir.Trained(run, module.layout, tokenizer, workdir.sharding.make_mesh(config.Mesh()), module, params, 0)


@pytest.mark.parametrize("path, kind", [("/", "text/html"), ("/page.css", "text/css"), ("/page.svg", "image/svg+xml"),
                                        ("/page.js", "text/javascript"), ("/look.js", "text/javascript")])  # fmt: skip
def test_files_and_their_headers(path, kind, trained):
    got = client(trained).get(path)
    assert got.status_code == 200 and got.headers["content-type"].partition(";")[0] == kind
    policy = got.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "unsafe" not in policy and "http" not in policy
    assert got.headers["x-content-type-options"] == "nosniff" and got.headers["cache-control"] == "no-cache"
    again = client(trained).get(path, headers={"if-none-match": got.headers["etag"]})
    assert again.status_code == 304 and not again.content and again.headers["etag"] == got.headers["etag"]
    assert client(trained).head(path).status_code == 200


def test_nothing_comes_from_elsewhere_and_nothing_stands_inline(trained):
    page = client(trained).get("/").text
    for name in re.findall(r"(?:src|href)=\"([^\"]*)\"", page):
        assert "/" + name in [f"/{file}" for file in look.FILES], f"{name} is no file of the page"
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*src=)", page), "the policy forbids it"
    scripts = [client(trained).get(path).text for path in ("/page.js", "/look.js", "/page.css")]
    assert not any(re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write", text) for text in scripts)


def test_the_package_has_its_files():
    listed = (Path(look.__file__).parents[2] / "setup.py").read_text()
    patterns = re.search(r'"gpt4v_jax.serve": \[(.*?)\]', listed)[1].replace('"', "").split(", ")
    for name in look.FILES:
        assert any(Path(name or "page.html").match(pattern) for pattern in patterns)


def test_where_an_answer_looked(trained):
    """The map of token n is that of the position before it, of prompt and answer laid as in training."""
    messages = [asked("which digit?", png(1), png(2)), {"role": "assistant", "content": "4"}, asked("and now?")]
    body = {"messages": messages, "answer": "red and blue"}
    ids = trained.tokenizer.encode("red and blue")
    got = client(trained).post("/look", json=body | {"token": 2, "picture": 1}).json()
    assert "".join(got["tokens"]) == "red and blue" and len(got["tokens"]) == len(ids) > 2
    assert (got["layers"], got["rows"], got["columns"], got["pictures"]) == (2, 2, 2, 2)
    assert got["covered"] == [1, 1] and got["resize"] == "square"

    media, read = prompts.attach(trained.layout, [("image", png(1)), ("image", png(2))])
    pieces = [chat.Piece("user", medium=m) for m in media]
    pieces += [chat.Piece(role, trained.tokenizer.encode(text)) for role, text in (
        ("user", "which digit?"), ("assistant", "4"), ("user", "and now?"), ("assistant", "red and blue"),
    )]  # fmt: skip
    whole = chat.document(pieces, trained.tokenizer.special, trained.layout)
    query = len(whole) - 1 - len(ids) + 2 - 1  # <end> and the answer are behind the prompt
    assert whole.tokens[query] == ids[1] and whole.tokens[query + 1] == ids[2]
    expected = attention.over_picture(trained, whole, read, query, 1)
    np.testing.assert_allclose(got["maps"], expected, atol=1e-5)
    first = client(trained).post("/look", json=body | {"token": 2}).json()["maps"]
    assert np.abs(np.array(first) - got["maps"]).max() > 1e-3, "the other picture has a map of its own"
    as_ids = client(trained).post("/look", json=body | {"answer": ids, "token": 2, "picture": 1}).json()
    assert as_ids == got


@pytest.mark.parametrize("change, message", [
    ({"token": 99}, "token=99: the answer has"), ({"token": -1}, "token=-1"), ({"token": True}, "token=True"),
    ({"picture": 1}, "picture=1: these messages have 1"), ({"answer": ""}, "answer=''"),
    ({"answer": [9**9]}, "outside"),
    ({"answer": ["a"]}, "answer="), ({"answer": "a" * 999}, "begin a new chat"), ({"messages": []}, "messages"),
    ({"messages": [asked("no picture")]}, "have 0"),
    ({"messages": [asked("damaged", b"no picture")]}, "not a picture"),
])  # fmt: skip
def test_errors_are_openais(change, message, trained):
    got = client(trained).post("/look", json={"messages": [asked("?", png(1))], "answer": "red"} | change)
    error = got.json()["error"]
    assert got.status_code == 400 and message in error["message"] and error["type"] == "invalid_request_error"


def test_its_body_is_json_as_everywhere(trained):
    for kind, status, message in (("application/json", 400, "no JSON"), ("text/plain", 415, "send application/json")):
        got = client(trained).post("/look", content=b"{", headers={"content-type": kind})
        assert got.status_code == status and message in got.json()["error"]["message"]


def test_a_key_is_asked_for_but_not_for_the_page(trained):
    guarded = client(trained, keys=(("me", "r" * 16),))
    body = {"messages": [asked("?", png(1))], "answer": "red"}
    for key, status in (("", 401), ("Bearer wrong", 401), ("Bearer " + "r" * 16, 200)):
        headers = {"authorization": key}
        assert guarded.get("/look/info", headers=headers).status_code == status
        assert guarded.post("/look", headers=headers, json=body).status_code == status
    assert all(guarded.get(f"/{name}").status_code == 200 for name in look.FILES)


def test_how_many_wait_and_how_long(trained):
    body = {"messages": [asked("?", png(1))], "answer": "red"}
    for settings, status, code in (({"queued": 0}, 429, "rate_limit_exceeded"), ({"seconds": 0.0}, 503, "timeout")):
        got = client(trained, **settings).post("/look", json=body)
        assert got.status_code == status and got.json()["error"]["code"] == code and got.headers["retry-after"]


def test_what_the_page_is_told_of_a_model(trained):
    assert client(trained, max_body=1000).get("/look/info").json() == {
        "chats": True, "modalities": ["image"], "context": 128, "attention": "", "most_bytes": 740,
    }  # fmt: skip
    text = dataclasses.replace(trained, texts=(trained.run.data.name,))
    assert look.info(text)["modalities"] == [] and "plain text" in look.info(text)["attention"]
    assert look.info(made(media=True))["modalities"] == ["image", "video", "audio"]


def test_models_without_a_place_for_patches():
    """The page says why, and so does the endpoint, before anything is decoded."""
    for values, message in (({**tiny.FUSIONS["q_former"]}, "q_former stands between"),
                            ({"size": 0}, "reads no pictures"), ({"buckets": 8}, "relative positions")):  # fmt: skip
        got = client(made(**values)).post("/look", json={"messages": [asked("?")], "answer": "red"})
        assert got.status_code == 400 and message in got.json()["error"]["message"]


@pytest.mark.parametrize("image, size, grid, covered", [
    ({"size": 4}, (9, 4), (2, 2), (1, 1)), ({"size": 4, "resize": "pad"}, (9, 4), (2, 2), (1, 1)),
    ({"size": 4, "resize": "native"}, (9, 4), (1, 2), (1, 1)),
    ({"size": 5, "encoder": config.Backbone(depth=1, width=16, heads=2, hidden=32)}, (9, 4), (2, 2), (0.8, 0.8)),
    ({"size": 4, "tiles": 2}, (9, 4), (2, 2), (1, 1)),
])  # fmt: skip
def test_what_the_patches_cover(image, size, grid, covered):
    trained = made(image=image)
    got = client(trained).post("/look", json={"messages": [asked("?", png(1, size))], "answer": "a"}).json()
    assert (got["rows"], got["columns"]) == grid and got["covered"] == pytest.approx(covered)
    assert got["resize"] == image.get("resize", "square")


def test_a_connector_that_merges_patches_covers_what_they_did():
    trained = made(size=6, **tiny.FUSIONS["pixel_shuffle"])  # 3 x 3 patches, 2 x 2 vectors
    got = client(trained).post("/look", json={"messages": [asked("?", png(1))], "answer": "a"}).json()
    assert (got["rows"], got["columns"]) == (2, 2) and got["covered"] == pytest.approx([4 / 3, 4 / 3])


def test_the_text_of_each_token():
    """A character of several tokens is the last one's, and nothing is lost, whatever the bytes."""
    trained = made()
    assert look.pieces(trained, trained.tokenizer.encode("aé€ b")) == ["a", "", "é", "", "", "€", " ", "b"]
    odd = [*trained.tokenizer.encode("x"), trained.tokenizer.encode("é")[0]]
    assert look.pieces(trained, odd) == ["x", "\N{REPLACEMENT CHARACTER}"]
