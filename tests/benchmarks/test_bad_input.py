"""What benchmarks.bad_input sends and how it counts; the server itself is tests/serve's."""

import json

import pytest

pytest.importorskip("av")

from benchmarks import bad_input, bad_kinds  # noqa: E402


def test_what_is_sent_is_what_its_name_says(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_kinds, "silence", lambda hours: b"fLaC")  # takes a second
    kinds = {kind.name: kind for kind in bad_kinds.kinds(1234, tmp_path)}
    assert len(kinds["this machine and its neighbours in 57 spellings"].bodies) == 57
    assert len(kinds["200 pictures"].bodies[0]["messages"][0]["content"]) == 201
    assert len(kinds["a body of 25 MB"].bodies[0]) > 25_000_000
    (deep,) = kinds["a schema 1,000 deep"].bodies
    assert deep.count(b"properties") == 1000 and deep.count(b"{") == deep.count(b"}")
    for name in ("a schema that is none", "stop strings: 1,000, an empty one, one of 1 MB"):
        assert len([json.dumps(body) for body in kinds[name].bodies]) == 3
    assert all(kind.bodies or kind.act for kind in kinds.values())
    bomb = kinds["a PNG of 12,000 x 12,000 pixels in 136 KiB"].bodies[0]["messages"][0]["content"][0]
    assert len(bomb["image_url"]["url"]) < 4 / 3 * 137 * 1024


def _found(name="x", statuses=(400,), right=True, times=(1.0, 1.5, 1.1), mebibytes=700.0):
    return bad_input.Found(name, 5, list(statuses), right, "no | good", list(times), mebibytes)


def test_what_is_wrong_or_slow_is_told():
    fine = {"alone": [0.5], "mebibytes": (600.0, 650.0, 690.0), "hits": 0, "end": 3.25, "status": 0}
    text = "\n".join(bad_input.lines(fine | {"found": [_found(), _found("y", mebibytes=710.0)]}))
    assert "2 of 2 kinds\n" in text and "1.10 x in the median (x), a single one 1.50 x; medians above 2: none" in text
    assert "600 MiB before any bad input, 650 behind the first of each kind, 710 at most from then on, 690 at" in text
    assert "at the end: +110" in text and "no \\| good" in text
    assert "takes 500 ms alone" in text and "must not be reached: 0" in text and "after 3.2 s" in text
    bad = [_found(), _found("y", (200,), False, (3.0, 2.5, 1.0))]
    text = "\n".join(bad_input.lines(fine | {"found": bad}))
    assert "1 of 2 kinds; wrong: y" in text and "200 **wrong**" in text and "medians above 2: y" in text
