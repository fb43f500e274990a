"""Text -> token ids. CLIP's byte-pair tokenizer comes from open_clip; a tokenizer here is a callable with a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

CLIP_BPE = "clip-bpe"
BERT_CHINESE = "bert-chinese"
MAX_CHARACTERS = 1 << 20  # of a text; more is refused
READ = 64  # characters per token of context that are read: no token is much longer than that


class Tokenizer:
    """Callable: str or list of str -> int64 tensor (n, context), SOT and EOT included, zero padded.

    A text longer than the context is cut and keeps EOT as its last token (open_clip's rule). Of a text of thousands of
    characters only the beginning is read, enough to fill the context: a tokenizer takes a second per megabyte.
    ValueError for what is not a text, or has more than MAX_CHARACTERS characters. Picklable and copyable where
    `encode`, (list of str, context) -> ids, is: for workers that are spawned.

    prepare: what the texts of data sets go through first, see `prepare_texts`; None for nothing.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[list[str], int], torch.Tensor],
        vocab_size: int,
        context: int,
        prepare: Callable[[str], str] | None = None,
    ):
        self.name, self.vocab_size, self.context = name, vocab_size, context
        self._encode, self.prepare = encode, prepare

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        if not isinstance(texts, (str, list, tuple)):
            raise ValueError(
                f"texts: {str(texts)[:80]!r} is a {type(texts).__name__}, should be a str or a list of them"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        context = context_length or self.context
        if not texts:
            return torch.zeros(0, context, dtype=torch.int64)
        return self._encode([_check_text(text, READ * context) for text in texts], context)


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
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _encode_clip(texts: list[str], context: int) -> torch.Tensor:
    return _clip_bpe()(texts, context_length=context)


def make_tokenizer(name: str = CLIP_BPE, context: int = 77) -> Tokenizer:
    """Build the tokenizer called `name` for sequences of `context` tokens. ValueError for an unknown name."""
    if context < 2:
        raise ValueError(f"context: {context} leaves no room for start and end of text; use at least 2")
    if name != CLIP_BPE:
        raise ValueError(f"tokenizer: {name!r} is not known; valid names: {CLIP_BPE!r}")
    return Tokenizer(name, _encode_clip, _clip_bpe().vocab_size, context)


def count_cut(texts: Sequence[str], tokens: torch.Tensor, tokenizer: Callable) -> int:
    """How many of the texts have more tokens than fit into the rows (n, context) that the tokenizer made of them.

    0 for a tokenizer that is not ours and cannot be asked for a longer context.
    """
    if not isinstance(tokenizer, Tokenizer):
        return 0
    longer = tokens.shape[1] + 1
    padding = tokenizer("", longer)[0, -1]
    full = torch.nonzero(tokens[:, -1] != padding).flatten().tolist()
    return int((tokenizer([texts[i] for i in full], longer)[:, -1] != padding).sum())
