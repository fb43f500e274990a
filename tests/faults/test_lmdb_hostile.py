"""LMDB folders that lie, are damaged or attack, and builders that are killed: errors of ours, and nothing runs."""

import base64
import os
import pickle
import pickletools
import random
import signal
import struct
from pathlib import Path

import pytest

from helpers.chinese_clip import RELEASED, dump, write_files, write_split
from helpers.crashes import KILLED, fork, wait
from helpers.pictures import picture
from rwkv_clip.data import lmdb_build
from rwkv_clip.data.image import ImageError
from rwkv_clip.data.lmdb import LmdbSet, Store
from rwkv_clip.data.lmdb_build import LmdbSettings, build_lmdb
from rwkv_clip.data.pair_pickle import PairError, parse_pair
from rwkv_clip.data.recordio import RecordError
from rwkv_clip.errors import DATA, run_command
from rwkv_clip.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer(context=8)
PAIR = (7, 1, "猫")
IMAGES = {7: base64.b64encode(picture(7)), 8: base64.b64encode(picture(8))}

# ---- pickles


class Attack:
    """A pickle of it calls os.mkdir."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


class State:
    def __setstate__(self, state):
        raise AssertionError("was run")


def attacks(place: Path) -> dict[str, bytes]:
    call = Attack(place)
    by_hand = b"cos\nmkdir\n(V%s\ntR" % str(place).encode()
    state = State()
    state.x = 1
    made = {
        f"{name}, protocol {protocol}": pickle.dumps(value, protocol)
        for protocol in range(6)
        for name, value in {
            "a call": call,
            "a call as the image id": (call, 1, "x"),
            "a call as the text id": (7, call, "x"),
            "a call as the text": (7, 1, call),
            "a call in a list": (7, 1, [call]),
            "a fourth, which calls": (7, 1, "x", call),
            "a class": (7, 1, State),
            "a state": (7, 1, state),
            "a buffer": (7, 1, bytearray(b"x")),
            "a range": (7, 1, range(3)),
        }.items()
    }
    made["a call before"] = b"\x80\x02" + by_hand + b"0" + pickle.dumps(PAIR, 2)[2:]
    made["a call after the end"] = pickle.dumps(PAIR, 4) + by_hand + b"."
    made["a call in place of the end"] = pickle.dumps(PAIR, 2)[:-1] + by_hand + b"."
    made["an extension"] = b"\x80\x02K\x07K\x01\x82\x01\x87."
    made["a persistent id"] = b"\x80\x02K\x07K\x01Px\n\x87."
    made["an instance"] = b"\x80\x02(Vx\nios\nmkdir\n."
    return made


def test_attacks_run_nothing(tmp_path):
    place = tmp_path / "made"
    for name, data in attacks(place).items():
        with pytest.raises(PairError, match=r"byte \d+|third"):
            print(name, parse_pair(data))
        assert not place.exists(), name
    write_split(tmp_path / "set", IMAGES, [PAIR] * 2, p_1=attacks(place)["a call, protocol 4"])
    records = LmdbSet(tmp_path / "set", TOKENIZER)
    with pytest.raises(RecordError, match=r"set pair 1: not a pickled \(image_id, text_id, text\): byte \d+: opcode"):
        records.sample(1)
    assert records.sample(0)[0] and not place.exists()
    with pytest.raises(FileExistsError):  # the attack is one
        place.mkdir()
        pickle.loads(attacks(place)["a call, protocol 4"])


OTHER_VALUES = [
    (7, 1),
    (7, 1, "x", "y"),
    [7, 1, "x"],
    (7, 1, 2),
    (7, 1, b"x"),
    (7, 1, None),
    (True, 1, "x"),
    (7, False, "x"),
    (7.0, 1, "x"),
    ((7,), 1, "x"),
    (7, 1, ("x",)),
    {7: "x"},
    "x",
    7,
    None,
    (),
    (b"7", 1, "x"),
    (7, {}, "x"),
]


@pytest.mark.parametrize("protocol", range(6))
def test_other_values_are_refused(protocol):
    for value in OTHER_VALUES:
        with pytest.raises(PairError):
            parse_pair(pickle.dumps(value, protocol))


FRAME = b"\x80\x04\x95"


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "byte 0: 1 bytes should follow, 0 are left"),
        (b"(I7\nI1\nVx\ntp0\n.", "no pickle of protocol 2 or later"),
        (b"\x80\x06K\x07K\x01\x8c\x01x\x87.", "byte 1: pickle protocol 6"),
        (b"\x80\x01K\x07K\x01X\x01\0\0\0x\x87.", "byte 1: pickle protocol 1"),
        (b"\x80\x04K\x07K\x01\x8c\xffx\x87.", "255 bytes should follow"),
        (b"\x80\x04K\x07K\x01\x8d" + b"\xff" * 8 + b"x\x87.", "bytes should follow"),
        (b"\x80\x04K\x07K\x01\x8b" + b"\xff" * 4 + b"x\x87.", "a number of 4,294,967,295 bytes"),
        (b"\x80\x04K\x07K\x01h\x00\x87.", "memo 0 holds no text"),
        (b"\x80\x04K\x07\x94K\x01\x8c\x01x\x87.", "opcode 0x94 instead of an int or a str"),
        (b"\x80\x04K\x07K\x01\x8c\x01\xff\x87.", "not UTF-8"),
        (b"\x80\x04K\x07K\x01\x8c\x01x\x85.", "byte 9: opcode 0x85 instead of the end of a tuple of three"),
        (b"\x80\x04K\x07K\x01\x8c\x01xR.", "opcode 0x52 instead of the end of a tuple of three"),
        (b"\x80\x04K\x07K\x01\x8c\x01x\x87R", "byte 10: opcode 0x52 instead of the end of the pickle"),
        (b"\x80\x04K\x07K\x01\x8c\x01x\x87.K", "byte 11: 1 bytes after the end"),
        (FRAME + struct.pack("<Q", 99) + b"K\x07K\x01\x8c\x01x\x87.", "a frame of 99 bytes, 9 are left"),
        (FRAME + struct.pack("<Q", 0) + b"K\x07K\x01\x8c\x01x\x87.", "a frame of 0 bytes"),
        (FRAME + struct.pack("<Q", 3) + b"K\x07K\x01\x8c\x01x\x87.", "bytes should follow, 0 are left"),
        (FRAME + struct.pack("<Q", 18) + b"\x95" + struct.pack("<Q", 9) + b"K\x07K\x01\x8c\x01x\x87.", "0x95"),
        (
            b"\x80\x04" + b"K\x07K\x01X" + struct.pack("<I", 1 << 23) + b"x" * (1 << 23) + b"\x87.",
            "more than 4,194,304",
        ),
    ],
)
def test_the_place_is_named(data, words):
    with pytest.raises(PairError, match=words):
        parse_pair(data)


def test_random_damage_is_a_pair_or_an_error():
    """What is accepted is what the real unpickler makes of it, and made of nothing but the opcodes of a pair."""
    random.seed(0)
    allowed = {
        *("PROTO", "FRAME", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "TUPLE3", "MEMOIZE", "BINPUT", "STOP"),
        *("LONG_BINPUT", "BINGET", "LONG_BINGET", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    }
    accepted = 0
    for number in range(20_000):
        data = bytearray(pickle.dumps((7, "猫" if number % 3 else 70_000, "一只 cat"), number % 4 + 2))
        for _ in range(random.choice((1, 1, 2, 4))):
            place = random.randrange(len(data))
            data[place : place + random.choice((0, 1, 1, 1))] = bytes([random.randrange(256)])
        try:
            found = parse_pair(bytes(data))
        except PairError:
            continue
        accepted += 1
        assert {opcode.name for opcode, _, _ in pickletools.genops(bytes(data))} <= allowed
        assert pickle.loads(bytes(data)) == found
    assert accepted > 500


# ---- folders


LIES = {
    "no count": (dict(num_samples=None), "pairs: has no num_samples: it was not finished"),
    "no count of images": (dict(num_images=None), "imgs: has no num_images: it was not finished"),
    "a count beyond the pairs": (dict(num_samples=b"3"), "num_samples is 3, but there are 2 pairs"),
    "a count of nothing": (dict(num_samples=b"0"), "num_samples is 0"),
    "a negative count": (dict(num_samples=b"-1"), "num_samples is b'-1', not a number"),
    "a count that is a text": (dict(num_samples=b"two"), "not a number"),
    "a huge count": (dict(num_samples=b"9" * 500), "not a number"),
}


@pytest.mark.parametrize("change, words", LIES.values(), ids=LIES)
def test_counts_that_lie(change, words, tmp_path, capsys):
    write_split(tmp_path, IMAGES, [PAIR, (8, 2, "x")], **change)
    assert run_command(lambda: LmdbSet(tmp_path, TOKENIZER) and 0) == DATA
    assert words in capsys.readouterr().err


FAULTS = {
    "a missing pair": (dict(p_0=None, p_9=b"x"), "pair 0: is missing"),
    "a missing image": (dict(i_7=None), "pair 0: .*image 7: is not in imgs"),
    "half a base64": (dict(i_7=IMAGES[7][:-3]), "pair 0: .*image 7: the picture is not complete base64"),
    "junk in base64": (dict(i_7=IMAGES[7][:8] + b"%" + IMAGES[7][9:]), "not complete base64"),
    "bytes that are no text": (dict(i_7=bytes(range(256))), "not complete base64"),
    "the count as an image": (dict(p_0=pickle.dumps(("num_images", 1, "x"))), "image num_images: is not in imgs"),
    "an empty id": (dict(p_0=pickle.dumps(("", 1, "x"))), "is not in imgs"),
    "an id longer than a key": (dict(p_0=pickle.dumps(("7" * 600, 1, "x"))), "is not in imgs"),
    "a huge number as id": (dict(p_0=pickle.dumps((1 << 4000, 1, "x"))), "is not in imgs"),
    "an empty text": (dict(p_0=pickle.dumps((7, 1, " \n"))), "pair 0: empty text"),
    "a text of nothing": (dict(p_0=pickle.dumps((7, 1, "\0"))), "pair 0: "),
    "half a character": (dict(p_0=pickle.dumps((7, 1, "\ud800"))), None),
    "a text without end": (dict(p_0=pickle.dumps((7, 1, "x" * (1 << 21)))), "pair 0: .*2,097,152 characters"),
}


@pytest.mark.parametrize("change, words", FAULTS.values(), ids=FAULTS)
def test_a_bad_pair_is_one_damaged_record(change, words, tmp_path):
    write_split(tmp_path, IMAGES, [PAIR, (8, 2, "x")], **change)
    records = LmdbSet(tmp_path, TOKENIZER)
    records.limit_vocab(TOKENIZER.vocab_size)
    assert len(records.digest) == 64 and records.sample(1)[0] == picture(8)
    if words:
        with pytest.raises(RecordError, match=words):
            records.sample(0)


def test_a_picture_beyond_the_limit_is_refused_by_its_length(tmp_path):
    write_split(tmp_path, {7: b"A" * 43_000_000}, [PAIR])
    with pytest.raises(ImageError, match="43,000,000 characters") as caught:
        LmdbSet(tmp_path, TOKENIZER).sample(0)
    assert caught.value.reason == "image too large"


def test_ids_that_are_texts_are_read(tmp_path):
    write_split(tmp_path, {"a.jpg": IMAGES[7], "猫": IMAGES[8]}, [("a.jpg", "t1", "x"), ("猫", 2, "y")])
    records = LmdbSet(tmp_path, TOKENIZER)
    assert [records.sample(i)[0] for i in range(2)] == [picture(7), picture(8)]


@pytest.mark.parametrize("name", ["pairs", "imgs"])
def test_a_file_that_was_cut_is_found_before_it_is_read(name, tmp_path):
    images = {i: base64.b64encode(picture(i, size=(64, 64))) for i in range(8)}
    write_split(tmp_path, images, [(i % 8, i, "x" * 50) for i in range(800)])
    file = tmp_path / name / "data.mdb"
    size = file.stat().st_size

    def read() -> None:
        with pytest.raises((RecordError, ValueError, OSError), match=f"{name}"):
            LmdbSet(tmp_path, TOKENIZER)

    for left in (size - 1, size - 4096, size // 2, 3 * 4096, 2 * 4096, 4097, 4096, 100, 1, 0):
        os.truncate(file, left)
        assert wait(fork(read)) == 0, f"cut at {left}"


@pytest.mark.parametrize("content", [b"", b"\0" * 100_000, b"text" * 9999], ids=["nothing", "zeros", "text"])
def test_files_that_are_no_lmdb(content, tmp_path, capsys):
    write_split(tmp_path, IMAGES, [PAIR])
    (tmp_path / "pairs/data.mdb").write_bytes(content)
    assert run_command(lambda: LmdbSet(tmp_path, TOKENIZER) and 0) == DATA
    assert "pairs" in capsys.readouterr().err


def test_half_a_split(tmp_path, capsys):
    write_split(tmp_path, IMAGES, [PAIR])
    (tmp_path / "imgs/data.mdb").unlink()
    assert run_command(lambda: LmdbSet(tmp_path, TOKENIZER) and 0) == DATA
    assert "has no imgs/data.mdb" in capsys.readouterr().err


# ---- builders that are killed


def build(folder: Path, target: Path) -> None:
    list(build_lmdb(LmdbSettings(str(folder), "train", str(target), overwrite=True)))


def test_killed_anywhere_and_started_again_gives_the_same_content(tmp_path, monkeypatch):
    """SIGKILL before or after the n-th write, for every n; the folder appears only when it is whole."""
    monkeypatch.setattr(lmdb_build, "COMMIT_LINES", 2)
    images = {i: picture(i) for i in range(9)} | {20: "broken"}
    write_files(tmp_path, "train", images, [(i, f"t{i}", [i, (i + 1) % 9]) for i in range(9)] + [(10, "x", [20])])
    (expected,) = build_lmdb(LmdbSettings(str(tmp_path), "train", str(tmp_path / "whole")))
    content = dump(tmp_path / "whole/train")
    places = {Store: ["put", "close"], lmdb_build: ["write_json", "sync_folder"], os: ["replace"]}
    places |= {lmdb_build.shutil: ["rmtree"]}

    def killed(target: Path, number: int, after: bool) -> None:
        left = [number]

        def watch(call):
            def counted(*arguments, **options):
                left[0] -= 1
                if not left[0] and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **options)
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return counted

        for owner, names in places.items():
            for name in names:
                setattr(owner, name, watch(getattr(owner, name)))
        build(tmp_path, target)

    deaths = 0
    for number in range(1, 99):
        for after in (False, True):
            target = tmp_path / f"{number}{after}"
            if number % 2:  # something is there already, which is replaced
                write_split(target / "train", IMAGES, [PAIR])
            code = wait(fork(killed, target, number, after))
            deaths += code == KILLED
            assert code in (0, KILLED)
            if (target / "train").exists() and not (number % 2 and len(dump(target / "train")["pairs"]) == 2):
                assert dump(target / "train") == content, "half a folder has the name of a whole one"
            (report,) = build_lmdb(LmdbSettings(str(tmp_path), "train", str(target), overwrite=True))
            assert dump(target / "train") == content
            assert (report.images, report.pairs, report.lines) == (expected.images, expected.pairs, expected.lines)
            assert report.remarks == expected.remarks and report.examples == expected.examples
            assert [path.name for path in target.iterdir()] == ["train"]
        if not code:
            break
    assert deaths > 20 and not code


def test_a_second_builder_waits_for_nobody(tmp_path, capsys):
    write_files(tmp_path, "train", {1: picture(1)}, [(1, "x", [1])])
    reading, writing = os.pipe()

    def first() -> None:
        lmdb_build._Builder.build = lambda self: (os.write(writing, b"x"), signal.pause())
        build(tmp_path, tmp_path / "lmdb")

    child = fork(first)
    try:
        os.read(reading, 1)
        assert run_command(lambda: build(tmp_path, tmp_path / "lmdb")) == 76
        assert "train: in use by" in capsys.readouterr().err
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)
    build(tmp_path, tmp_path / "lmdb")


def test_a_full_disk_is_storage(tmp_path, monkeypatch, capsys):
    import lmdb

    def full(self, *_, **__):
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    write_files(tmp_path, "train", {1: picture(1)}, [(1, "x", [1])])
    monkeypatch.setattr(Store, "_reporting_full", lambda self: _Failing(self, full))
    assert run_command(lambda: build(tmp_path, tmp_path / "lmdb")) == 76
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    build(tmp_path, tmp_path / "lmdb")


class _Failing:
    """`Store._reporting` around a call that fails."""

    def __init__(self, store, call):
        self.inner, self.call = store._reporting(), call

    def __enter__(self):
        self.inner.__enter__()
        try:
            self.call(None)
        except Exception as error:
            self.inner.__exit__(type(error), error, error.__traceback__)

    def __exit__(self, *_):
        return False


def test_the_released_set_is_left_as_it_is():
    assert len(dump(RELEASED / "lmdb/train")["pairs"]) == 11
