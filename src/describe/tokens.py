"""CLIP tokens of a text, counted quickly, and texts cut to a context.

The count is that of open_clip's SimpleTokenizer, which is CLIP's: the text is mended (ftfy, HTML entities) and
lower-cased, split, and each piece merged by the byte pairs of the vocabulary file that open_clip ships. White space
separates pieces for good, so a word's count is remembered. Importing open_clip itself would cost each worker seconds.
"""

from __future__ import annotations

import gzip
import html
from bisect import bisect_right
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from unicodedata import is_normalized

import ftfy
import regex
from ftfy.badness import is_bad

CONTEXT = 77  # of CLIP's text towers, start and end of text included
READ = 64 * CONTEXT  # characters of a text that are read, as rwkv_clip.tokenizer does
_SPECIAL = ("<start_of_text>", "<end_of_text>")
# CLIP's own pattern (openai/CLIP, simple_tokenizer.py): special tokens, English endings, letters, one digit, the rest.
_PIECES = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_MERGES = 49152 - 256 - 2  # of the vocabulary's 49,408 entries; the rest are bytes, bytes at a word's end, special ones
_LONGEST_REMEMBERED = 64  # characters of a word
_OPEN_ENDS = {  # words that no text ends with
    *("a", "an", "the", "of", "and", "or", "in", "on", "at", "with", "by", "for", "from", "to", "as", "is", "are"),
    *("was", "were", "its", "his", "her", "their", "this", "that", "while", "next", "near", "very"),
}


def count_tokens(text: str) -> int:
    """CLIP tokens of `text`, start and end of text included. Exact for texts of up to READ characters; of a longer
    one, its white space collapsed, the first READ characters are counted."""
    return 2 + sum(_count_words(_split(text)))


def fits(text: str, context: int = CONTEXT) -> bool:
    """Whether a tower with `context` positions sees all of the text."""
    return count_tokens(text) <= context


def trim(text: str, context: int = CONTEXT) -> str:
    """The text, or its beginning that fits: up to the last clause border in the second half of what fits, else up to
    a word that may end a text. The full stop of a text stays its end. ValueError for a context below 3."""
    if context < 3:
        raise ValueError(f"context: {context} leaves no room between start and end of text; use at least 3")
    if fits(text, context):
        return text
    words = " ".join(text.split())[:READ].split(" ")
    stop = "." if text.rstrip().endswith(".") else ""
    sums = list(accumulate(sum(_count_words(_split(word))) for word in words))
    most = bisect_right(sums, context - 2 - len(stop))
    for kept in range(_find_border(words, most), 0, -1):
        shorter = _close(words[:kept], stop)
        if shorter and fits(shorter, context):
            return shorter
    return _trim_word(words[0], context)


def _close(words: list[str], stop: str) -> str:
    """The words as the end of a text: without what waits for more."""
    words = list(words)
    while words and words[-1].lower().strip(",;:-–—&+(") in ("", *_OPEN_ENDS):
        words.pop()
    closed = " ".join(words).rstrip(" ,;:-–—&+(")
    if closed.count("(") > closed.count(")"):
        closed = closed[: closed.rindex("(")].rstrip(" ,;:-–—&+(")
    return closed if closed.endswith((".", "!", "?")) else closed + stop if closed else ""


def _find_border(words: list[str], most: int) -> int:
    """How many of the first `most` words to keep."""
    borders = [i for i in range(most // 2 + 1, most + 1) if words[i - 1].endswith((".", "!", "?", ",", ";", ":"))]
    ends = [i for i in borders if words[i - 1].endswith((".", "!", "?"))]
    return (ends or borders or [most])[-1]


def _trim_word(word: str, context: int) -> str:
    """The longest beginning that fits of a word that does not: a longer beginning hardly ever has fewer tokens."""
    low, high = 0, min(len(word), READ)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(word[:middle], context) else (low, middle - 1)
    return word[:low]


# ---- the count -------------------------------------------------------------------------------------------------------


class _Mended(dict):
    """Table for str.translate, filled on demand: what ftfy makes of a character alone."""

    def __missing__(self, code: int) -> str:
        self[code] = ftfy.fix_text(chr(code))
        return self[code]


_mended = _Mended()


def _split(text: str) -> list[str]:
    """Lower-case words as the tokenizer sees them."""
    if len(text) > READ:
        text = " ".join(text.split())[:READ]
    if "&" in text or not text.isprintable():
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    elif not text.isascii():
        text = _mend(text)
    return text.lower().split()


@lru_cache(maxsize=1 << 10)  # a text is counted when it is written and again when it is checked
def _mend(text: str) -> str:
    """ftfy.fix_text, which takes longer than all else here, of a text without control characters and HTML: where
    nothing looks like a wrong encoding, it changes single characters and normalizes."""
    if not is_bad(text):
        fixed = text.translate(_mended)
        if is_normalized("NFC", fixed) and (fixed == text or fixed.isascii() or not is_bad(fixed)):
            return fixed
    return ftfy.fix_text(text)


def _count_words(words: list[str]) -> list[int]:
    return [_count_word(word) if len(word) <= _LONGEST_REMEMBERED else _count(word) for word in words]


def _count(word: str) -> int:
    return sum(_count_pairs(piece) for piece in _PIECES.findall(word))


_count_word = lru_cache(maxsize=1 << 16)(_count)  # some 10 MB when full


@cache
def _ranks() -> dict[tuple[str, str], int]:
    """Byte pair -> its place in the list of merges, the first one is merged first."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
    return {(first, second): i for i, (first, second) in enumerate(line.split() for line in lines)}


@cache
def _byte_letters() -> list[str]:
    """The letter that stands for each byte in the vocabulary: itself where it is printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _count_pairs(piece: str) -> int:
    """Tokens of one piece: the pair of lowest rank is merged everywhere, from the left, until none is in the list."""
    if piece in _SPECIAL:
        return 1
    letters = _byte_letters()
    parts = [letters[byte] for byte in piece.encode("utf-8", "replace")]
    parts[-1] += "</w>"
    ranks, never = _ranks(), len(_ranks())
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda pair: ranks.get(pair, never))
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if parts[i] == pair[0] and i + 1 < len(parts) and parts[i + 1] == pair[1]:
                merged.append(pair[0] + pair[1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return len(parts)
