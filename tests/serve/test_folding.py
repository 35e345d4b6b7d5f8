"""What a reader takes for one word folds alike, and no run of characters is sorted in quadratic time."""

import sys
import unicodedata

import pytest

from gpt4v_jax.serve import folding

# How "darn" can be disguised -> caught.
DISGUISES = {
    "capitals": "DaRN", "fullwidth": "ｄａｒｎ", "fullwidth capitals": "ＤＡＲＮ", "zero width": "da\u200brn",
    "joiners": "d\u200da\u200cr\u2060n\ufeff", "soft hyphen": "da\u00adrn", "direction": "\u202ed\u202ca\u2066rn",
    "accents": "dàrñ", "combining": "da\u0301\u0323r\u0336n", "enclosing": "d\u20dda\u20dern",
    "zalgo": "d" + "\u0315\u031b" * 99 + "arn",
    "another alphabet's marks": "d\u093ea\u094d\u094d\u094d\u094d\u094d\u094drn", "variation": "d\ufe0fa\U000e0101rn",
    "bold": "𝐝𝐚𝐫𝐧", "script": "𝓓𝓪𝓻𝓷", "double-struck": "𝕕𝕒𝕣𝕟", "circled": "ⓓⓐⓡⓝ", "squared": "🄳🄰🅁🄽",
    "superscript": "ᵈᵃʳⁿ",
    "small capitals": "ᴅᴀʀɴ", "Cyrillic": "dаrn", "Greek": "dαrn", "stroke": "đarn", "controls": "d\0a\x08r\x1f\x7fn",
    "tags": "d\U000e0061arn", "filler": "da\u3164r\uffa0n", "half a pair": "da\ud800rn", "dotted": "ḋạṙṇ",
}  # fmt: skip
# Not caught, as docs/moderation.md says.
OTHERS = {"figures": "d4rn", "signs": "d@rn", "spaced": "d a r n", "dots": "d.a.r.n", "stretched": "daaarn",
          "negative circled": "🅓🅐🅡🅝", "flags": "🇩🇦🇷🇳", "reversed": "nrad", "typing error": "dran"}  # fmt: skip


@pytest.mark.parametrize("name", DISGUISES)
def test_disguises_fold_to_the_word(name):
    assert folding.words(folding.fold(f"so {DISGUISES[name]}, it")) == ["so", "darn", "it"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_seen_through(name):
    assert "darn" not in folding.words(folding.fold(OTHERS[name]))


def test_words_that_differ_stay_apart():
    for one, other in (("か", "が"), ("ハ", "パ"), ("क", "क़"), ("कि", "की"), ("darn", "darns"), ("가", "나")):
        assert folding.fold(one) != folding.fold(other)
    for one, other in (("Straße", "STRASSE"), ("ﬁ", "fi"), ("ガ", "ｶﾞ"), ("שָׁלוֹם", "שלום"), ("كَتَبَ", "كتب"),
                       ("İ", "i"), ("ς", "Σ")):  # fmt: skip
        assert folding.fold(one) == folding.fold(other)
    assert folding.words(folding.fold("हिन्दी, ไทย")) == folding.words(folding.fold("हिन्दी")) + [folding.fold("ไทย")]


def test_a_plain_text_folds_as_any_other():
    text = "".join(map(chr, range(128)))
    assert folding.fold(text) == folding.fold(text + "é")[:-1]


def test_clean_keeps_case_and_accents():
    assert folding.clean("Ｄà\u200brn\u00ad É\ud800") == "Dàrn É"


@pytest.mark.parametrize("run", ["\u0301\u0323", "\u093c\u094d", "\uff9e\u094d", "\u0f73", "\u0344\u0323"])
def test_runs_of_marks_are_cut_before_they_are_sorted(run, monkeypatch):
    """CPython sorts them by insertion."""
    longest, real = [], unicodedata.normalize

    def normalize(form, text):
        made = real(form, text)
        marked = "".join("x" if unicodedata.combining(char) else " " for char in real("NFKD", text))
        longest.append(max(map(len, marked.split()), default=0))
        return made

    monkeypatch.setattr(folding.unicodedata, "normalize", normalize)
    for start in "aक\uff76":
        folding.fold(start + run * 500)
        folding.clean(start + run * 500)
    assert len(longest) == 9 and max(longest) <= 10


def test_all_that_becomes_a_mark_is_one():
    """So that no other run can grow in normalize."""
    for char in map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]):
        if unicodedata.combining(unicodedata.normalize("NFKD", char)[0]):
            assert ord(char) in folding._MARKS, hex(ord(char))


def test_settled():
    for text, count in (("so dar", 3), ("so ", 3), ("so", 0), ("", 0), ("so,", 3), ("so, it\u0301", 4),
                        ("so.\u200b", 3), ("so \u200bda", 3), ("a b\u200b", 2), ("x½", 0), ("x⑴", 2)):  # fmt: skip
        assert folding.settled(text) == count, text
