"""Features of Chinese-CLIP's data, written as its extract_features.py writes them.

`{X}_texts.txt_feat.jsonl` has {"text_id": 1, "feature": [..]} in the order of the texts, `{X}_imgs.img_feat.jsonl`
{"image_id": 7, "feature": [..]} in that of the images; features have length 1, and every digit of their float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from rwkv_clip.dist import rank_and_size
from rwkv_clip.files import write_whole
from rwkv_clip.tokenizer import count_cut, prepare_texts

from .cache import data_key, encode_cached
from .chinese_sets import ChineseClipSet
from .encoder import Encoder
from .number_text import join_numbers

_ROWS = 16  # written at a time: their numbers stay in a core's cache


def write_chinese_features(
    encoder: Encoder, data: ChineseClipSet, prefix: str = "", images: str | None = None, texts: str | None = None
) -> list[Path]:
    """Encode what the set has and write it, on all ranks; returns the files. images, texts: other names for these."""
    written = []
    if data.texts:
        tokenizer = encoder.loaded.tokenizer
        prepared = prepare_texts(tokenizer, [prefix + text for text in data.texts])
        tokens = tokenizer(prepared)
        if (cut := count_cut(prepared, tokens, tokenizer)) and rank_and_size()[0] == 0:
            print(f"{cut} texts are longer than the context of {tokens.shape[1]} tokens: cut", file=sys.stderr)
        place = Path(texts or f"{data.stem}_texts.txt_feat.jsonl")
        written.append(_write(place, "text_id", data.text_ids, encoder.extractor.encode_tokens(tokens)))
    if data.image_ids:
        items = [*map(str, data.image_ids), *data.files]
        vectors = encode_cached(
            encoder, lambda: data_key(data.name, None, len(data.image_ids), data.open, items), data.open
        )
        place = Path(images or f"{data.stem}_imgs.img_feat.jsonl")
        written.append(_write(place, "image_id", data.image_ids, vectors))
    return written


def _write(path: Path, key: str, ids: Sequence[int], vectors: Tensor) -> Path:
    if rank_and_size()[0] == 0:
        write_whole(path, _lines(key, ids, vectors))
    return path


def _lines(key: str, ids: Sequence[int], vectors: Tensor) -> Iterator[bytes]:
    """As json.dumps writes {key: id, "feature": [numbers]}."""
    for start in range(0, len(ids), _ROWS):
        texts = join_numbers(vectors[start : start + _ROWS].numpy())
        for number, text in zip(ids[start : start + _ROWS], texts):
            yield b'{"%b": %d, "feature": [%b]}\n' % (key.encode(), number, text)
