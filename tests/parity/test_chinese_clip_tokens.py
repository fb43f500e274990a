"""Chinese-CLIP's tokenizer: ids of the released code, and a plain reading of the definition on any string."""

import copy
import json
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from rwkv_clip.tokenizer import BERT_CHINESE, CLIP_BPE, count_cut, make_tokenizer, prepare_texts
from rwkv_clip.tokenizer import VOCABULARY as VOCABULARY_FILE

GIVEN = json.loads((Path(__file__).parent / "cn_clip" / "tokens.json").read_text(encoding="utf-8"))
LINES = (Path(make_tokenizer.__code__.co_filename).parent / "bert-chinese" / "vocab.txt").read_text(encoding="utf-8")
VOCABULARY = {line.strip(): i for i, line in enumerate(LINES.split("\n")[:-1])}
CJK = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)]
CJK += [(0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]


# ---- the definition, one step after the other ------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    clean = ""
    for c in text:
        code, category = ord(c), unicodedata.category(c)
        if c in " \t\n\r" or category == "Zs":
            clean += " "
        elif code not in (0, 0xFFFD) and category not in ("Cc", "Cf"):
            clean += f" {c} " if any(first <= code <= last for first, last in CJK) else c
    words = []
    for word in clean.split():
        plain = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        part = ""
        for c in plain:
            code = ord(c)
            if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
                is_punctuation = True
            else:
                is_punctuation = unicodedata.category(c)[0] == "P"
            if is_punctuation:
                words += [part, c]
                part = ""
            else:
                part += c
        words.append(part)
    return " ".join(words).split()


def pieces_of(word: str) -> list[str]:
    if len(word) > 200:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = word[start:end] if start == 0 else "##" + word[start:end]
            if piece in VOCABULARY:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces


def ids_of(text: str, context: int) -> list[int]:
    pieces = [piece for word in words_of(text) for piece in pieces_of(word)]
    ids = [101, *(VOCABULARY[piece] for piece in pieces[: context - 2]), 102]
    return ids + [0] * (context - len(ids))


# ---- given numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", GIVEN["items"], ids=lambda item: ascii(item["text"])[:30])
def test_ids_are_those_of_the_released_code(item):
    tokenizer = make_tokenizer(BERT_CHINESE, 52)
    assert tokenizer.vocab_size == GIVEN["vocab_size"]
    assert tokenizer(item["text"])[0].tolist() == item["ids52"] == ids_of(item["text"], 52)
    assert tokenizer(prepare_texts(tokenizer, [item["text"]]), 24)[0].tolist() == item["ids24_of_prepared"]


def test_only_data_sets_prepare():
    """The public tokenizer leaves curly quotes, which the vocabulary does not have."""
    tokenizer = make_tokenizer(BERT_CHINESE, 8)
    assert tokenizer("“好”")[0].tolist() == [101, 100, 1962, 100, 102, 0, 0, 0]
    assert prepare_texts(tokenizer, ["“Hao”"]) == ['"hao"']
    assert prepare_texts(make_tokenizer(CLIP_BPE), ["“Hao”"]) == ["“Hao”"]


# ---- any string ------------------------------------------------------------------------------------------------------

NASTY = [
    *("\0", "\ufffd", "\x01", "\x1c", "\x7f", "\x85", "\xad", "\u200b", "\u200d", "\u202e", "\ufeff", "\U000e0041"),
    *(" ", "\t", "\n", "\r", "\v", "\f", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000"),
    *(
        "[CLS]",
        "[SEP]",
        "[PAD]",
        "[UNK]",
        "[MASK]",
        "##",
        "##a",
        "#",
        "$",
        "^",
        "`",
        "~",
        "|",
        "+",
        "“",
        "”",
        "，",
        "。",
        "《",
    ),
    *(
        "Ａ",
        "ｚ",
        "９",
        "！",
        "㈱",
        "㎏",
        "ﬁ",
        "½",
        "①",
        "Ⅷ",
        "ℌ",
        "Ǆ",
        "ß",
        "ẞ",
        "İ",
        "ı",
        "ſ",
        "Σ",
        "σ",
        "ς",
        "ΑΣ",
        "ΑΣ.",
    ),
    *(
        "é",
        "e\u0301",
        "ö",
        "Å",
        "ç",
        "ñ",
        "ạ̈",
        "\u0301",
        "\u0323\u0308",
        "\u302e",
        "\u3099",
        "が",
        "か\u3099",
        "한",
        "글",
    ),
    *("好", "马", "\u3400", "\u4db5", "\u4db6", "\u9fef", "\u9fff", "\ua000", "\U00020000", "\U0002a6df", "\U0002a6e0"),
    *("\U0002a700", "\U0002b740", "\U0002b820", "\U0002b91f", "\U0002b920", "\U0002ceaf", "\U0002ceb0", "\U00030000"),
    *("\uf900", "\ufa0e", "\ufaff", "\U0002f800", "\U0002fa1f", "\U0002fa20", "\u3007", "々", "〆", "ー", "ｱ", "ㄅ"),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🇨🇳",
        "☺\ufe0f",
        "👍🏽",
        "1\ufe0f\u20e3",
        "\ue000",
        "\U000f0000",
        "\u0378",
        "\U0001fffe",
    ),
    *(
        "\ud800",
        "\udfff",
        "\uffff",
        "ก็",
        "हिन्दी",
        "ע",
        "עִ",
        "العَرَبِيَّة",
        "ა",
        "Ꭰ",
        "ꭰ",
        "K",
        "Ω",
        "℃",
        "\u0345",
        "ᾳ",
        "\u1fef",
    ),
    *(
        "a",
        "B",
        "the",
        "Photo",
        "iPhone12",
        "wang",
        "http://t.cn/x?y=1",
        "3.14",
        "2022",
        "中国",
        "gmail",
        "ing",
        "x" * 199,
    ),
    *(
        "x" * 200,
        "x" * 201,
        "a" * 200,
        "a" * 201,
        "é" * 200,
        "é" * 201,
        "e\u0301" * 200,
        "\u0301" * 600,
        "a\u0301\u0323" * 400,
    ),
]


@pytest.mark.parametrize("seed", range(4))
def test_any_string(seed):
    draw, tokenizer = random.Random(seed), make_tokenizer(BERT_CHINESE)
    texts = []
    for _ in range(6000):
        parts = draw.choices(NASTY, k=draw.randint(0, 12))
        parts += [chr(draw.randrange(draw.choice((256, 0x3000, 0x20000, 0x110000)))) for _ in range(draw.randint(0, 6))]
        draw.shuffle(parts)
        texts.append(draw.choice(("", "", " ")).join(parts))
    context = draw.choice((2, 3, 24, 52, 300, 512))
    found = tokenizer(texts, context).tolist()
    for text, row in zip(texts, found):
        assert row == ids_of(text, context), ascii(text)


def test_the_order_of_marks_does_not_matter():
    """What the tokenizer's decomposition relies on: marks that it keeps are in no piece."""
    marks = [c for c in set(LINES) if unicodedata.combining(c)]
    assert all(unicodedata.category(c) == "Mn" for c in marks)


def test_every_kind_of_character():
    """Between letters, where it is dropped, splits, or makes the word unknown; every seventh beyond the first ones."""
    tokenizer = make_tokenizer(BERT_CHINESE)
    codes = [*range(0x3400), *range(0x3400, 0x110000, 61), *range(0xA000, 0x20000, 7)]
    texts = [f"a{chr(code)}b {chr(code)}" for code in codes]
    for text, row in zip(texts, tokenizer(texts, 9).tolist()):
        assert row == ids_of(text, 9), ascii(text)


@pytest.mark.parametrize("context", [2, 3, 24, 52, 512])
def test_long_texts_are_cut_and_counted(context):
    """A word of 200 characters may be one piece, and what is dropped counts as nothing."""
    tokenizer = make_tokenizer(BERT_CHINESE, context)
    texts = ["好" * (context - 2), "好" * (context - 1), f"{'q' * 300} " * (context - 2), "\u200b" * 99999 + "好"]
    texts += ["x" * 100000 + " 好", "好 " * 9999, " " * 99999 + "好", "", "é" * 99999, "\u0301\u0323" * 9999 + "好"]
    tokens = tokenizer(texts)
    for text, row in zip(texts, tokens.tolist()):
        assert row == ids_of(text, context), ascii(text)[:40]
    assert count_cut(texts, tokens, tokenizer) == sum(len(words_of(text)) > context - 2 for text in texts)


@pytest.mark.parametrize("text", ["a", "a b ", "好", "é", "e\u0301\u0323", "\u0323\u0301", "한", "\0", " ", "Σ", "."])
def test_a_megabyte_is_read(text):
    """In 0.1 to 0.7 s; steps that grow with the square of the length, as Python's NFD of accents, would take hours."""
    ids = make_tokenizer(BERT_CHINESE)([(text * 10**6)[: 10**6]])
    assert ids.shape == (1, 77) and (ids == 102).sum() == 1


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_give_equal_ids(carry):
    tokenizer = make_tokenizer(BERT_CHINESE, 52)
    carried = carry(tokenizer)
    texts = [item["text"] for item in GIVEN["items"]]
    assert torch.equal(carried(texts), tokenizer(texts)) and len(pickle.dumps(tokenizer)) < 1000
    assert (carried.name, carried.vocab_size, carried.context) == (BERT_CHINESE, 21128, 52)
    assert prepare_texts(carried, ["A“"]) == ['a"']


def test_a_process_that_starts_anew_gives_equal_ids():
    tokenizer, text = make_tokenizer(BERT_CHINESE, 16), "杰出的Red连衣裙😀"
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(sys.argv[1]).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, text], input=pickle.dumps(tokenizer), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str(tokenizer(text).tolist())


def test_mistakes():
    with pytest.raises(ValueError, match="context: 513 is more than BERT's 512 positions"):
        make_tokenizer(BERT_CHINESE, 513)
    with pytest.raises(ValueError, match="'bert' is not known; valid names: 'clip-bpe', 'bert-chinese'"):
        make_tokenizer("bert")
    with pytest.raises(ValueError, match="should be a str"):
        make_tokenizer(BERT_CHINESE)([b"x"])


@pytest.mark.parametrize("character", ["\ue000", "\U0002b8a0"], ids=["private", "extension E"])
def test_the_library_still_gives_other_ids(character):
    """Why the tokenizer is our own. Where this fails, the library may have caught up: compare all code points."""
    library = pytest.importorskip("tokenizers")
    theirs = library.BertWordPieceTokenizer(str(VOCABULARY_FILE), lowercase=True)
    text = f"狗{character}a"
    assert make_tokenizer(BERT_CHINESE, 12)(text)[0].tolist() == (definition := ids_of(text, 12))
    assert [i for i in definition if i] != theirs.encode(text).ids
    assert theirs.encode("一只狗。").ids == [i for i in ids_of("一只狗。", 12) if i]
