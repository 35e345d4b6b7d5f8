"""Text <-> token ids, by the `tokenizers` library: trained on a corpus, or read from files of other models.

    python -m gpt4v_jax.data.tokenizer train --kind bpe --vocab 4096 --out tok.json corpus.txt more.txt
    python -m gpt4v_jax.data.tokenizer show --tokenizer tok.json "some text"

Special tokens are ids that no text encodes to: what a user types stays plain text. docs/tokenizers.md has the kinds.
"""

import collections
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from absl import flags
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gpt4v_jax import command, config

# <image>, <video> and <audio> are placeholders of media.
SPECIALS = ("<pad>", "<end>", "<user>", "<assistant>", "<image>", "<video>", "<audio>")
KINDS = ("char", "byte", "bpe", "wordpiece")  # trained here; a path is the other choice
MASK = "<mask>"  # there where a run asks for it (data.objectives)
UNKNOWN = "[UNK]"  # of WordPiece. Not among the special tokens: an answer shows where it stands.


class Tokenizer:
    """encode, decode, the size of the vocabulary, and the ids of the special tokens (`special["<end>"]`).

    end: the tokens that end an answer; `ends` are their ids. The first one is `special["<end>"]`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end: tuple[str, ...] = ("<end>",)):
        inner.encode_special_tokens = True  # "<end>" in a text is five characters, not the special token
        inner.no_truncation()  # some files bring both: a prompt would be cut, or filled up
        inner.no_padding()
        # An added token that ends answers is special, whatever its file says: else a user could type it. One of the
        # vocabulary itself, such as a line's end, stays text.
        added = {token.content for token in inner.get_added_tokens_decoder().values() if not token.special}
        inner.add_special_tokens([token for token in end if token in added])
        self.inner = inner
        self.vocab = inner.get_vocab_size(with_added_tokens=True)
        self.ends = tuple(id for id in map(inner.token_to_id, end) if id is not None)
        ids = {name: inner.token_to_id(name) for name in SPECIALS} | {"<end>": self.ends[0] if self.ends else None}
        self.special = {name: id for name, id in ids.items() if id is not None}

    def encode(self, text: str) -> list[int]:
        """Raises InputError for a character that a character vocabulary does not have."""
        if isinstance(self.inner.model, models.WordLevel):
            known = self.inner.get_vocab()
            odd = next((char for char in text if char not in known), None)
            if odd is not None:
                raise config.InputError(f"the character {odd!r} is not in the vocabulary of {len(known)} characters")
        return self._ids(text, False)

    def prompt(self, text: str) -> list[int]:
        """`encode`, with what the tokenizer puts around every text: a first token (Llama), a last one (T5), or none."""
        return self._ids(text, True) if self.inner.post_processor else self.encode(text)

    def ends_in(self, text: str) -> list[int]:
        """-> where in the text each token of `encode(text)` ends, in characters; bytes of one character share its
        end."""
        return [end for _, end in self.inner.encode(text, add_special_tokens=False).offsets]

    def _ids(self, text: str, around: bool) -> list[int]:
        try:
            return self.inner.encode(text, add_special_tokens=around).ids
        except TypeError as error:  # half a surrogate pair: a command line's bytes that are not UTF-8
            raise config.InputError(f"the text {text!r} is not Unicode: is it UTF-8?") from error

    def id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    @property
    def mask(self) -> int | None:
        """The token that stands for a hidden one: ours and RoBERTa's, or BERT's."""
        return next((id for id in map(self.id, (MASK, "[MASK]")) if id is not None), None)

    def words(self) -> np.ndarray:
        """-> the ids that are no special tokens, rising."""
        added = self.inner.get_added_tokens_decoder().items()
        special = [*self.special.values(), *self.ends, *(id for id, token in added if token.special)]
        return np.setdiff1d(np.arange(self.vocab), special)

    def token(self, id: int) -> str | None:
        return self.inner.id_to_token(id)

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens are left out."""
        drop = {*self.special.values(), *self.ends}
        return self.inner.decode([int(i) for i in ids if int(i) not in drop], skip_special_tokens=True)

    def to_json(self) -> str:
        """What `load` reads from a file."""
        return self.inner.to_str(pretty=True)


def load(path: Path, end: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """Reads a tokenizer.json, BERT's vocab.txt, or a folder with GPT-2's vocab.json and merges.txt."""
    path = Path(path)
    if path.is_dir():
        return Tokenizer(_gpt2(path), end)
    if not path.is_file():
        raise config.InputError(f"{path} is missing: a model's tokenizer belongs beside its config.json")
    if path.suffix == ".txt":
        return Tokenizer(_bert(path), end)
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), end)
    except Exception as error:  # the library raises nothing more special
        raise config.InputError(f"{path} is no tokenizer of the tokenizers library: {error}") from error


def train(
    kind: str, texts: Iterable[str], vocab: int, end: tuple[str, ...] = ("<end>",), lower: bool = False,
    extra: tuple[str, ...] = (),
) -> Tokenizer:  # fmt: skip
    """kind "char": the corpus's characters in sorted order, no special tokens; "byte": the 256 bytes, nothing is
    trained; "bpe", "wordpiece": at most `vocab` tokens; a path that `load` reads: that tokenizer, with our special
    tokens behind its own vocabulary. lower: "wordpiece" makes letters small and drops accents, as BERT's uncased does.
    extra: more special tokens, behind all others and beyond `vocab`; those that a tokenizer has keep their ids.
    """
    made = _trained(kind, texts, vocab, end, lower)
    missing = [token for token in extra if token != MASK or made.mask is None]
    made.inner.add_special_tokens(missing)
    return Tokenizer(made.inner, end) if missing else made


def _trained(kind: str, texts: Iterable[str], vocab: int, end: tuple[str, ...], lower: bool) -> Tokenizer:
    if lower and kind != "wordpiece":
        raise config.InputError(f"lower is for 'wordpiece' alone: {kind!r} keeps letters as they are")
    if kind == "char":
        return Tokenizer(_characters(texts), end)
    if kind not in KINDS and (kind.endswith((".json", ".txt")) or Path(kind).is_dir()):
        inner = load(Path(kind)).inner
        inner.add_special_tokens(list(SPECIALS))
        # Nothing around a text: documents and windows are laid without it, so prompts are, too.
        if inner.post_processor is not None:  # a run's own file stays what it is, by which init_from.run knows it
            inner.post_processor = processors.TemplateProcessing("$0")
        return _with_end(inner, end)
    config.one_of("data.tokenizer", kind, (*KINDS, "*.json", "a folder with vocab.json and merges.txt", "*.txt"))
    if kind == "byte":
        return _with_end(_bytes(), end)
    inner = _bpe(texts, vocab) if kind == "bpe" else _wordpiece(texts, vocab, lower)
    least = inner.get_vocab_size()
    if least > vocab:
        raise config.InputError(f"a vocabulary of {vocab} is too small: single characters take {least}, give more")
    return _with_end(inner, end)


def _with_end(inner: tokenizers.Tokenizer, end: tuple[str, ...]) -> Tokenizer:
    made = Tokenizer(inner, end)
    if not made.ends:
        raise config.InputError(f"data.end={end!r} names no token of this tokenizer: which one ends a document?")
    return made


# ---- kinds


def _characters(texts: Iterable[str]) -> tokenizers.Tokenizer:
    chars: set[str] = set()
    for text in texts:  # one by one: a corpus need not fit in memory
        chars.update(text)
    inner = tokenizers.Tokenizer(models.WordLevel({char: i for i, char in enumerate(sorted(chars))}))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return inner


def _byte_level(model: models.BPE, words: bool = True) -> tokenizers.Tokenizer:
    """A model of bytes, each written as a visible character. words: no token reaches across GPT-2's words."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()  # bytes that are no UTF-8 become U+FFFD
    return inner


def _bytes() -> tokenizers.Tokenizer:
    """Byte b is id len(SPECIALS) + b."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's alphabet: the others count from 256 on
    others = itertools.count(256)
    chars = [chr(b if b in visible else next(others)) for b in range(256)]
    inner = _byte_level(models.BPE({token: i for i, token in enumerate([*SPECIALS, *chars])}, []), words=False)
    inner.add_special_tokens(list(SPECIALS))
    return inner


def _bpe(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016): every text has an encoding. Special tokens take the first ids."""
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=list(SPECIALS),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return inner


def _gpt2(folder: Path) -> tokenizers.Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise config.InputError(
                f"{folder / name} is missing: a folder is GPT-2's vocab.json and merges.txt; a tokenizer.json or a "
                "vocab.txt is named itself"
            )
    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        inner = _byte_level(models.BPE(vocab, merges))
    except Exception as error:  # the library raises nothing more special
        raise config.InputError(f"{folder}: vocab.json and merges.txt are no BPE: {error}") from error
    # <|endoftext|>, <s>: no merge leads there, for a word has letters or signs, not both.
    inner.add_special_tokens(sorted((t for t in vocab if re.fullmatch(r"<\|\w+\|>|</?\w+>", t)), key=vocab.get))
    return inner


def _word_pieces(vocab: dict[str, int], special: Iterable[str], lower: bool) -> tokenizers.Tokenizer:
    """BERT's WordPiece (Devlin et al. 2019): each Chinese character is a word, ## goes on with a word.

    Decoding is lossy: of spaces it knows nothing, words are joined by one.
    """
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lower)  # accents go where letters become small
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(list(special))
    return inner


def _wordpiece(texts: Iterable[str], vocab: int, lower: bool) -> tokenizers.Tokenizer:
    first = [*SPECIALS, UNKNOWN]
    inner = _word_pieces({token: i for i, token in enumerate(first)}, SPECIALS, lower)
    words: collections.Counter[str] = collections.Counter()
    for text in texts:
        words.update(word for word, _ in inner.pre_tokenizer.pre_tokenize_str(inner.normalizer.normalize_str(text)))
    # The library meets ##x in a hash's order, which differs from process to process, and ids break its ties: given as
    # if they were special tokens, they have their ids before it starts.
    inside = sorted({f"##{char}" for word in words for char in word[1:]})
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=first + inside, show_progress=False)
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(words.elements(), trainer)
    return _word_pieces(trained.get_vocab(), SPECIALS, lower)


def _bert(path: Path) -> tokenizers.Tokenizer:
    try:
        tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # not splitlines: U+2028 may be a token
    except UnicodeDecodeError as error:
        raise config.InputError(f"{path} is not UTF-8: {error}") from error
    vocab = {token: i for i, token in enumerate(tokens)}
    if UNKNOWN not in vocab:
        raise config.InputError(f"{path} has no line {UNKNOWN}: it is no vocabulary of BERT's")
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise config.InputError(f"{path}: the token {twice!r} stands there twice, in line {vocab[twice] + 1} again")
    special = [token for token in tokens if re.fullmatch(r"\[[A-Z]+\]", token) and token != UNKNOWN]
    # [MASK] and <S> have capitals in an uncased vocabulary, too.
    cased = any(re.search("[A-Z]", token) for token in tokens if not re.fullmatch(r"\[.*\]|<.*>", token))
    return _word_pieces(vocab, special, lower=not cased)


# ---- the command


def train_on(files: list[Path], out: Path, kind: str, vocab: int, lower: bool = False) -> Tokenizer:
    """Trains on files of text, line by line, and writes a tokenizer.json, whole or not at all."""
    config.one_of("--kind", kind, KINDS)
    if not out.parent.is_dir() or out.is_dir():
        raise config.InputError(f"--out={out}: " + ("is a folder" if out.is_dir() else f"no folder {out.parent}"))
    for path in files:
        if not path.is_file():
            raise config.InputError(f"the corpus {path} is missing, or no file")
    made = train(kind, _lines(files), vocab, lower=lower)
    try:
        handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=out.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(made.to_json())
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
            os.replace(temporary, out)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise config.InputError(f"--out={out} cannot be written: {error.strerror}") from error
    return made


def _lines(files: list[Path]) -> Iterator[str]:
    empty = True
    for path in files:
        with open(path, "rb") as file:  # bytes: a line's end stays as it is
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise config.InputError(f"{path}, line {number} is not UTF-8: {error.reason}") from error
                empty = empty and not text.strip()
                yield text
    if empty:
        raise config.InputError(f"the corpus {', '.join(map(str, files))} is empty: there is nothing to train on")


def table(made: Tokenizer, text: str) -> str:
    """A line for each token of the text: its id, the token, and what it decodes to alone."""
    return "\n".join(f"{id:>7}  {made.token(id):<16} {json.dumps(made.decode([id]), ensure_ascii=False)}"
                     for id in made.encode(text))  # fmt: skip


def _command() -> None:
    """Flags are defined here: other commands import this module, and have flags of the same names."""
    kind = flags.DEFINE_string("kind", "bpe", f"train: {' | '.join(KINDS)}")
    vocab = flags.DEFINE_integer("vocab", 4096, "train: tokens at most, of bpe and wordpiece", lower_bound=1)
    lower = flags.DEFINE_bool("lower", False, "train: wordpiece without capitals and accents")
    out = flags.DEFINE_string("out", None, "train: the tokenizer.json to write")
    source = flags.DEFINE_string("tokenizer", None, "show: a tokenizer.json, vocab.txt, or folder with vocab.json")

    def needed(flag: flags.FlagHolder) -> Path:
        if not flag.value:
            raise config.InputError(f"--{flag.name} is missing: --help lists the flags")
        return Path(flag.value)

    def main(action: str, *rest: str) -> None:
        config.one_of("the action", action, ("train", "show"))
        if action == "train":
            made = train_on(list(map(Path, rest)), needed(out), kind.value, vocab.value, lower.value)
            print(f"{out.value}: {kind.value}, {made.vocab:,} tokens")
        elif len(rest) > 1:
            raise config.InputError(f"show takes one text, {len(rest)} are given: put it in quotes")
        else:
            print(table(load(needed(source)), rest[0]))

    try:
        given = len(flags.FLAGS(sys.argv)) - 1
    except flags.Error:
        given = 0  # command.run meets it again, and says it
    more = ["a further file"] * (given - 2)
    command.run(main, arguments=("the action (train, show)", "a file of text, or the text to show", *more))


if __name__ == "__main__":
    _command()
