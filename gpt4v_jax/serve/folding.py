"""Texts as word lists compare them: one spelling for what a reader takes for one, and its words.

After Unicode's NFKC_Casefold (UAX #31), but accents go, too, and the most usual of the confusables of UTS #39 are one
letter. All of it is linear in the text's length.
"""

import re
import unicodedata

_CODES = (*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE1000))  # where marks and format characters are
_KIND = {code: unicodedata.category(chr(code)) for code in _CODES}
_MARKS = sorted([code for code in _CODES if _KIND[code][0] == "M"] + [0xFF9E, 0xFF9F])  # these two decompose to marks
# Not seen: format characters (zero width, soft hyphen, direction), controls, variation selectors, fillers, tatweel,
# halves of surrogate pairs.
_UNSEEN = {code for code in _CODES if _KIND[code] in ("Cf", "Cc") and chr(code) not in "\t\n\v\f\r\x85"}
_UNSEEN |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000), *range(0xD800, 0xE000)}
_UNSEEN |= set(map(ord, "\u034f\u0640\u115f\u1160\u17b4\u17b5\u2065\u3164\uffa0"))
# Accents, and what is drawn around letters. The other marks are part of a letter: nukta, voicing of kana, virama, vowel
# signs.
_ACCENTS = {code for code in _MARKS if unicodedata.combining(chr(code)) not in (0, 7, 8, 9) or _KIND[code] == "Me"}
# Letters of other alphabets, and of phonetics, that are drawn as a Latin one is.
LOOKALIKES = str.maketrans(
    "авекмнорстухѕіјһԁԛԝӏ" "αβεηικνορτυχγω" "ıłøđħŧɑɡɩ" "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ",
    "abekmhopctyxsijhdqwl" "abenikvoptuxyw" "ilodhtagi" "abcdefghijklmnoprstuvwyz",
)  # fmt: skip


def _ranges(codes: list[int]) -> str:
    """-> rising code points as a class of a regular expression, which is much faster in ranges."""
    starts = [code for i, code in enumerate(codes) if not i or codes[i - 1] != code - 1]
    ends = [code for i, code in enumerate(codes) if i + 1 == len(codes) or codes[i + 1] != code + 1]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


def _sub(pattern: str, by: str, codes: set[int]):
    """-> a function that substitutes a pattern, without a search where none of the characters is there."""
    compiled, needed = re.compile(pattern), frozenset(map(chr, codes))
    return lambda text: text if needed.isdisjoint(text) else compiled.sub(by, text)


_MARK = _ranges(_MARKS)
_visible = _sub(f"[{_ranges(sorted(_UNSEEN))}]+", "", _UNSEEN)
_plain = _sub(f"[{_ranges(sorted(_UNSEEN | _ACCENTS))}]+", "", _UNSEEN | _ACCENTS)
_short_runs = _sub(rf"([{_MARK}]{{4}})[{_MARK}]+", r"\1", set(_MARKS))
# Latin, Greek, Cyrillic and Armenian letters, and what stands among them, have no other marks, either.
_european = _sub(rf"([\0-\u058f])[{_MARK}]+", r"\1", set(_MARKS))
_WORD = re.compile(rf"(?:[^\W_]|[{_MARK}])+")


def clean(text: str) -> str:
    """-> the text in NFKC, without what is not seen and without long runs of marks; case and accents stay."""
    # Before normalize, whose time is quadratic in the length of a run of marks: 40,000 of them took it 4 seconds.
    return unicodedata.normalize("NFKC", _short_runs(_visible(text)))


def fold(text: str) -> str:
    """-> the text in small letters, decomposed (NFKD), without accents and without what is not seen, look-alikes of
    Latin letters as these. Two texts that fold alike are one for a word list."""
    if text.isascii():  # the same, faster
        return _visible(text).lower()
    text = _short_runs(_plain(text))  # before normalize, see clean
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return _european(_plain(text)).translate(LOOKALIKES)


def words(folded: str) -> list[str]:
    """-> the words of a folded text: runs of letters and digits."""
    return _WORD.findall(folded)


def signs(folded: str) -> str:
    """-> what of a folded text is no word."""
    return _WORD.sub("", folded)


def ended(folded: str) -> bool:
    """Whether a folded text's last word has ended: what follows begins another one."""
    return not _WORD.match(folded[-1:])


def settled(text: str) -> int:
    """-> how many characters of a text that goes on are whole words, which no more text can change."""
    at = len(text)
    while at and not ((last := fold(text[at - 1])) and ended(last)):
        at -= 1
    return at
