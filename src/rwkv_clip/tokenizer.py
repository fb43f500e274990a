"""Text -> token ids. A tokenizer here is a callable with a name.

CLIP's byte-pair tokenizer comes from open_clip. BERT's WordPiece for Chinese is written here from its definition: the
`tokenizers` library (0.23) gives other ids, for example it drops private code points and does not set every ideograph
of extension E apart (`parity/test_chinese_clip_tokens.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from open_clip.tokenizer import SimpleTokenizer

CLIP_BPE = "clip-bpe"
BERT_CHINESE = "bert-chinese"
NAMES = (CLIP_BPE, BERT_CHINESE)
MAX_CHARACTERS = 1 << 20  # of a text; more is refused
READ = 64  # characters per token of context that are read: no token is much longer than that


class Tokenizer:
    """Callable: str, or list, tuple or array of str -> int64 tensor (n, context), SOT and EOT included, zero padded.

    A text longer than the context is cut and keeps EOT as its last token (open_clip's rule). Of a text of thousands of
    characters only the beginning is read, enough to fill the context: a tokenizer takes a second per megabyte.
    ValueError for what is not a text, or has more than MAX_CHARACTERS characters. Picklable and copyable where
    `encode`, (list of str, context) -> ids, is: for workers that are spawned.

    prepare: what the texts of data sets go through first, see `prepare_texts`; None for nothing. whole: `encode` gets
    all of a text, because a token of this tokenizer may stand for any number of characters.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[list[str], int], torch.Tensor],
        vocab_size: int,
        context: int,
        prepare: Callable[[str], str] | None = None,
        whole: bool = False,
    ):
        self.name, self.vocab_size, self.context = name, vocab_size, context
        self._encode, self.prepare, self._whole = encode, prepare, whole

    @property
    def context_length(self) -> int:
        """The context, by open_clip's name."""
        return self.context

    @property
    def sot_token_id(self) -> int:
        """Start of text. ValueError as for `encode`."""
        return find_codec(self).start

    @property
    def eot_token_id(self) -> int:
        """End of text. ValueError as for `encode`."""
        return find_codec(self).end

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start, end and padding. ValueError for another library's tokenizer that
        cannot say them."""
        return find_codec(self).encode(_check_text(text, MAX_CHARACTERS))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids, a list or a tensor of one dimension; start, end and padding are left out. What the tokenizer
        has changed (case, spaces) stays changed. ValueError as for `encode`."""
        codec = find_codec(self)
        ids = [int(token) for token in tokens]
        ids = ids[: ids.index(codec.end)] if codec.end in ids else ids
        return codec.decode([token for token in ids if token not in (codec.start, codec.padding)])

    def with_context(self, context: int) -> Tokenizer:
        """The same for another context."""
        if self.name in NAMES:
            return make_tokenizer(self.name, context)
        return Tokenizer(self.name, self._encode, self.vocab_size, context, self.prepare, self._whole)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        if not isinstance(texts, (str, list, tuple)) and hasattr(texts, "tolist"):  # numpy's, pandas', pyarrow's
            texts = texts.tolist()
        if not isinstance(texts, (str, list, tuple)):
            raise ValueError(
                f"texts: {str(texts)[:80]!r} is a {type(texts).__name__}, should be a str or a list of them"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        context = context_length or self.context
        if not texts:
            import torch

            return torch.zeros(0, context, dtype=torch.int64)
        most = MAX_CHARACTERS if self._whole else READ * context
        return self._encode([_check_text(text, most) for text in texts], context)


def prepare_texts(tokenizer: Callable, texts: Sequence[str]) -> list[str]:
    """The texts of a data set as the tokenizer's training had them; unchanged for most tokenizers."""
    prepare = tokenizer.prepare if isinstance(tokenizer, Tokenizer) else None
    return [prepare(text) for text in texts] if prepare else list(texts)


def _check_text(text: str, most: int) -> str:
    """The text, or the beginning that is read. White space does not count: tokenizers collapse it."""
    if not isinstance(text, str):
        raise ValueError(f"text: {str(text)[:80]!r} is a {type(text).__name__}, should be a str")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"text: {len(text):,} characters, more than {MAX_CHARACTERS:,}; cut it: {text[:40]!r} ..")
    return text if len(text) <= most else " ".join(text.split())[:most]


@lru_cache(maxsize=1)
def _clip_bpe() -> SimpleTokenizer:
    """open_clip's, of its file alone: the package imports torchvision, timm and transformers, which takes longer than
    to load a model."""
    package = importlib.util.find_spec("open_clip")
    if package is not None and package.origin is not None and "open_clip" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "_open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py")
        )
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with contextlib.suppress(ImportError):  # another version's file may need its package
                spec.loader.exec_module(module)
                return module.SimpleTokenizer()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _encode_clip(texts: list[str], context: int) -> torch.Tensor:
    return _clip_bpe()(texts, context_length=context)


def make_tokenizer(name: str = CLIP_BPE, context: int = 77) -> Tokenizer:
    """Build the tokenizer called `name` for sequences of `context` tokens. ValueError for an unknown name."""
    if context < 2:
        raise ValueError(f"context: {context} leaves no room for start and end of text; use at least 2")
    if name == BERT_CHINESE:
        if context > MOST_POSITIONS:
            raise ValueError(f"context: {context} is more than BERT's {MOST_POSITIONS} positions; use at most those")
        return Tokenizer(name, _encode_bert, len(_bert_chinese()), context, _prepare_chinese, whole=True)
    if name != CLIP_BPE:
        raise ValueError(f"tokenizer: {name!r} is not known; valid names: {', '.join(map(repr, NAMES))}")
    return Tokenizer(name, _encode_clip, _clip_bpe().vocab_size, context)


class Codec(NamedTuple):
    """A tokenizer without start, end and padding."""

    start: int
    end: int
    padding: int | None  # None where 0 is a token as any other
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def find_codec(tokenizer: Tokenizer) -> Codec:
    """What `encode` and `decode` use. ValueError for another library's tokenizer that cannot say it."""
    if tokenizer.name == BERT_CHINESE:
        return Codec(START, END, PAD, lambda text: list(_find_pieces(text)), _join_pieces)
    theirs: Any = _clip_bpe() if tokenizer.name == CLIP_BPE else tokenizer._encode
    if hasattr(theirs, "sot_token_id"):  # open_clip's SimpleTokenizer
        # Its padding is 0, which is also the token "!" followed by no space: a decoded text keeps that.
        return Codec(theirs.sot_token_id, theirs.eot_token_id, None, theirs.encode, theirs.decode)
    inner: Any = getattr(theirs, "tokenizer", None)  # of transformers, in open_clip's HFTokenizer
    ends = [getattr(inner, f"{one}_token_id", None) for one in ("bos", "cls", "eos", "sep", "pad")]
    start, end = (next((one for one in pair if one is not None), None) for pair in (ends[:2], ends[2:4]))
    if end is None:
        raise ValueError(f"tokenizer: {tokenizer.name!r} does not say its start and end of text; use its own functions")
    return Codec(
        -1 if start is None else start,
        end,
        ends[4],
        lambda text: inner.encode(text, add_special_tokens=False),
        inner.decode,
    )


def count_cut(texts: Sequence[str], tokens: torch.Tensor, tokenizer: Callable) -> int:
    """How many of the texts have more tokens than fit into the rows (n, context) that the tokenizer made of them.

    0 for a tokenizer that is not ours and cannot be asked for a longer context.
    """
    if not isinstance(tokenizer, Tokenizer):
        return 0
    longer = tokens.shape[1] + 1
    padding = tokenizer("", longer)[0, -1]
    full = (tokens[:, -1] != padding).nonzero().flatten().tolist()
    return int((tokenizer([texts[i] for i in full], longer)[:, -1] != padding).sum())


# ---- BERT's WordPiece ------------------------------------------------------------------------------------------------
#
# From the definition of BERT's tokenizer (Devlin et al. 2018, arXiv 1810.04805, and Google's code): characters are
# cleaned and ideographs set apart, a text is split at white space, each word is lower-cased, freed of accents and split
# at punctuation, and each part becomes the longest pieces of the vocabulary, from the left.

PAD, UNKNOWN, START, END = 0, 100, 101, 102  # [PAD], [UNK], [CLS], [SEP]: lines of vocab.txt
VOCABULARY = Path(__file__).parent / "bert-chinese" / "vocab.txt"
MOST_POSITIONS = 512  # of every released BERT
_LONGEST_WORD = 200  # characters; a longer word is unknown
# BERT's own idea of CJK: ideographs and their extensions A to E, and the compatibility ideographs.
_IDEOGRAPHS = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)),
    *((0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


class _Cleaned(dict):
    """Table for str.translate, filled on demand: control characters go, white space becomes a space, an ideograph a
    word of its own."""

    def __missing__(self, code: int) -> str | None:
        character, category = chr(code), unicodedata.category(chr(code))
        if character in "\t\n\r" or category == "Zs":
            self[code] = " "
        elif code in (0, 0xFFFD) or category in ("Cc", "Cf"):
            self[code] = None
        else:
            self[code] = f" {character} " if any(a <= code <= b for a, b in _IDEOGRAPHS) else character
        return self[code]


class _Separated(dict):
    """The same for a lower-case word: decomposed, accents go, punctuation becomes a word of its own.

    Canonical decomposition (NFD) also sorts marks, in a time that grows with the square of their number. That is left
    out: most of them go, and a word with one of the others is unknown in any order.
    """

    def __missing__(self, code: int) -> str:
        self[code] = "".join(map(self._separate, unicodedata.normalize("NFD", chr(code))))
        return self[code]

    @staticmethod
    def _separate(character: str) -> str:
        category = unicodedata.category(character)
        # ASCII's symbols count as punctuation, also those that Unicode calls symbols, such as $ and ^.
        symbol = "!" <= character <= "~" and not character.isalnum()
        if category == "Mn":
            return ""
        return f" {character} " if symbol or category.startswith("P") else character


_cleaned, _separated = _Cleaned(), _Separated()


@lru_cache(maxsize=1)
def _bert_chinese() -> dict[str, int]:
    """Word piece -> id, of the list that is shipped."""
    text = VOCABULARY.read_bytes().decode()
    return {piece.strip(): i for i, piece in enumerate(text.removesuffix("\n").split("\n"))}


def _encode_bert(texts: list[str], context: int) -> torch.Tensor:
    import torch

    ids = torch.full((len(texts), context), PAD)
    rows = ids.numpy()
    for row, text in zip(rows, texts):
        pieces = [START, *islice(_find_pieces(text), context - 2), END]
        row[: len(pieces)] = pieces
    return ids


def _find_pieces(text: str) -> Iterator[int]:
    for word in text.translate(_cleaned).split():
        yield from _split_word(word) if len(word) <= _LONGEST_WORD else _split(word)


def _split(word: str) -> list[int]:
    """Ids of the pieces of a word without white space and control characters."""
    return [i for part in word.lower().translate(_separated).split() for i in _find_longest(part)]


_split_word = lru_cache(maxsize=1 << 15)(_split)  # a few MB; ideographs and common words


def _find_longest(word: str) -> list[int]:
    """Longest pieces first, greedily; one unknown piece where that does not work out."""
    if len(word) > _LONGEST_WORD:
        return [UNKNOWN]
    vocabulary, found, begin = _bert_chinese(), [], 0
    while begin < len(word):
        prefix = "##" if begin else ""
        ends = range(len(word), begin, -1)
        end = next((end for end in ends if prefix + word[begin:end] in vocabulary), None)
        if end is None:
            return [UNKNOWN]
        found.append(vocabulary[prefix + word[begin:end]])
        begin = end
    return found


def _join_pieces(ids: list[int]) -> str:
    """Words of pieces: no space between ideographs, one between other words."""
    pieces = _pieces()
    text, before = "", ""
    for token in ids:
        piece = pieces[token]
        joined = piece.startswith("##") or not text or _is_ideograph(piece) or _is_ideograph(before)
        text, before = text + ("" if joined else " ") + piece.removeprefix("##"), piece
    return text


@lru_cache(maxsize=1)
def _pieces() -> list[str]:
    """Id -> word piece."""
    return list(_bert_chinese())


def _is_ideograph(piece: str) -> bool:
    return len(piece) == 1 and any(a <= ord(piece) <= b for a, b in _IDEOGRAPHS)


def _prepare_chinese(text: str) -> str:
    """What Chinese-CLIP does to the texts of its data sets: its vocabulary has no curly quotes."""
    return text.lower().replace("“", '"').replace("”", '"')
