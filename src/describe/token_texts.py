"""Published token ids -> texts. What CLIP's tokenizer took away is lost: capitals, where spaces were, what was cut.

The released YFCC15M has lists of 77 ids; the array with the raw texts and OFA's captions is (N, 154).
"""

from __future__ import annotations

import numpy as np

from rwkv_clip.data.encode import RowError

CONTEXT = 77  # of published token arrays


class Decoder:
    """Token ids -> texts."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer()
        self._decode = tokenizer.decode
        self._start, self._end = (tokenizer.encoder[f"<{name}_of_text>"] for name in ("start", "end"))

    def __call__(self, tokens: np.ndarray | None) -> list[str]:
        """Texts of an array of (texts * 77,) or (texts, 77) ids. RowError for anything else."""
        if tokens is None or not tokens.size or tokens.size % CONTEXT:
            raise RowError(f"no token ids, or not {CONTEXT} for each text")
        return [self._decode_one(ids) for ids in np.asarray(tokens).reshape(-1, CONTEXT)]

    def _decode_one(self, values: np.ndarray) -> str:
        """The text up to its end; 0 is also "!", so only what follows the last other id is padding where there is no
        end."""
        if not (values.min() >= 0 and values.max() <= self._end) or (values != np.floor(values)).any():
            raise RowError("token ids out of range")
        ids = values.astype(np.int64).tolist()
        if self._end in ids:
            ids = ids[: ids.index(self._end)]
        else:
            while ids and ids[-1] == 0:
                ids.pop()
        return self._decode(ids[1:] if ids[:1] == [self._start] else ids).strip()


def find_text(texts: list[str], kind: str) -> str | None:
    """Of a row's texts, in the released order, the raw one or the caption; a row of one text has what is asked for."""
    place = 0 if kind == "raw" or len(texts) == 1 else 1
    return texts[place] or None
