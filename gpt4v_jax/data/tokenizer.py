"""Text <-> token ids, by the `tokenizers` library: a character table or a byte-level BPE, trained on a corpus.

Special tokens are ids that no text encodes to: what a user types stays plain text.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gpt4v_jax import config

SPECIALS = ("<pad>", "<end>", "<user>", "<assistant>", "<image>")


class Tokenizer:
    """encode, decode, the size of the vocabulary, and the ids of the special tokens (`special["<end>"]`).

    end: the tokens that end an answer; `ends` are their ids. The first one is `special["<end>"]`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end: tuple[str, ...] = ("<end>",)):
        inner.encode_special_tokens = True  # "<end>" in a text is five characters, not the special token
        inner.no_truncation()  # some files bring both: a prompt would be cut, or filled up
        inner.no_padding()
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
        return self.inner.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """`encode`, with what the tokenizer puts around every text: a first token (Llama), a last one (T5), or none."""
        return self.inner.encode(text, add_special_tokens=True).ids if self.inner.post_processor else self.encode(text)

    def id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

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
    if not path.is_file():
        raise config.InputError(f"{path} is missing: a model's tokenizer belongs beside its config.json")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), end)
    except Exception as error:  # the library raises nothing more special
        raise config.InputError(f"{path} is no tokenizer of the tokenizers library: {error}") from error


def train(kind: str, texts: Iterable[str], vocab: int, end: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """kind "char": the corpus's characters in sorted order, no special tokens; "bpe": at most `vocab` tokens; a path
    ending in .json: that tokenizer, with our special tokens behind its own vocabulary."""
    if kind.endswith(".json"):
        loaded = load(Path(kind))
        loaded.inner.add_special_tokens(list(SPECIALS))
        # Nothing around a text: documents and windows are laid without it, so prompts are, too.
        loaded.inner.post_processor = processors.TemplateProcessing("$0")
        return _with_end(loaded.inner, end)
    config.one_of("data.tokenizer", kind, ("char", "bpe", "*.json"))
    return Tokenizer(_characters(texts), end) if kind == "char" else _with_end(_bpe(texts, vocab), end)


def _with_end(inner: tokenizers.Tokenizer, end: tuple[str, ...]) -> Tokenizer:
    made = Tokenizer(inner, end)
    if not made.ends:
        raise config.InputError(f"data.end={end!r} names no token of this tokenizer: which one ends a document?")
    return made


def _characters(texts: Iterable[str]) -> tokenizers.Tokenizer:
    chars = sorted(set().union(*texts))
    inner = tokenizers.Tokenizer(models.WordLevel({char: i for i, char in enumerate(chars)}))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return inner


def _bpe(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016): every text has an encoding. Special tokens take the first ids."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=list(SPECIALS),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return inner
