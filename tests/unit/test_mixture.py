"""Several sources with factors: exact shares in every epoch, nothing left out, and a single source as it always was."""

import hashlib
import math
import pickle
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from helpers.loading import make
from helpers.pictures import encode, photo, tokens_of, write_records
from rwkv_clip.config import ConfigError, parse
from rwkv_clip.data.mixture import Mixture, Source, describe_shares, identify, open_mixture, parse_factors
from rwkv_clip.data.records import RecordSet
from rwkv_clip.training.data.augment import draw_texts
from rwkv_clip.training.data.order import MixedOrder, Order, make_order
from rwkv_clip.training.data.samples import DataError, SampleReader
from rwkv_clip.training.settings import DataSettings

# Records and samples an epoch of each source.
MIXES = [
    ([60, 20], [30, 50]),
    ([10], [7]),
    ([10, 3, 1], [15, 1, 4]),
    ([1, 1], [1, 1]),
    ([7, 12, 30], [7, 12, 30]),
    ([97, 64], [64, 97]),
    ([5, 1000], [500, 10]),
]
FROZEN = [(10, 0), (2, 0), (12, 0), (11, 0), (9, 0), (12, 3), (0, 0), (11, 49)]


def walk(counts: list[int], samples: list[int], epochs: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(record indices, passes) of some epochs, (epochs, samples an epoch) each."""
    total = sum(samples)
    ids, passes = MixedOrder(counts, samples, seed).find(np.arange(epochs * total))
    return ids.reshape(epochs, total), passes.reshape(epochs, total)


# ---- order


@pytest.mark.parametrize("counts, samples", MIXES, ids=str)
def test_shares_are_exact_and_records_of_a_source_come_equally_often(counts, samples):
    ids, _ = walk(counts, samples, 40)
    seen = np.stack([np.bincount(epoch, minlength=sum(counts)) for epoch in ids])
    begin = 0
    for count, share in zip(counts, samples):
        own = seen[:, begin : begin + count]
        begin += count
        assert (own.sum(1) == share).all()
        for times in (own, *([first] for first in own.cumsum(0))):  # every epoch, and the first k epochs for any k
            low = np.sum(times[0]) // count
            assert np.min(times) == low and np.max(times) == low + (np.sum(times[0]) % count > 0)


@pytest.mark.parametrize("counts, samples", MIXES, ids=str)
def test_no_record_has_a_pass_twice_and_none_is_left_out(counts, samples):
    ids, passes = (found.ravel() for found in walk(counts, samples, 60))
    assert len(set(zip(ids.tolist(), passes.tolist()))) == len(ids), "equal ones would be cropped alike"
    begin = 0
    for count in counts:
        own = passes[(begin <= ids) & (ids < begin + count)]
        begin += count
        assert (np.bincount(own)[: len(own) // count] == count).all(), "a pass is all records, each once"


def test_any_place_is_found_at_once_and_alone():
    order = MixedOrder([15_061_515, 10**9, 1], [30_123_030, 10**8, 7], 5)
    assert len(pickle.dumps(order)) < 3000
    many = np.arange(10**12, 10**12 + 512)
    ids, passes = order.find(many)
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        order.find(many)
        took.append(time.perf_counter() - begin)
    assert min(took) < 2e-2
    for place in (0, 77, 511):
        assert order.at(int(many[place])) == ids[place]
        assert [x.tolist() for x in order.find(many[place : place + 1])] == [[ids[place]], [passes[place]]]
    assert order.at(many.reshape(2, 256)).shape == (2, 256)


def test_the_order_is_frozen():
    # A run resumed by a later version must go on in the same order.
    places = np.array([0, 1, 2, 3, 4, 17, 18, 246])
    ids, passes = MixedOrder([10, 3], [2, 3], 7).find(places)
    assert list(zip(ids.tolist(), passes.tolist())) == FROZEN


def test_sources_meet_everywhere_and_epochs_and_seeds_are_unrelated():
    ids, _ = walk([5000, 100], [5000, 5000], 2)
    other, _ = walk([5000, 100], [5000, 5000], 1, seed=4)
    small = ids >= 5000
    for part in small.reshape(20, 1000):  # half of each, give or take 5 standard deviations
        assert abs(part.sum() - 500) < 5 * math.sqrt(250)
    for left, right in ((ids[0], ids[1]), (ids[0], other[0]), (small[0], small[1])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.05
    first, second = (epoch[epoch < 5000] for epoch in ids)
    assert (first == second).sum() < 10, "the whole of a source in another order each epoch"


def test_half_of_a_source_is_another_half_in_the_next_round():
    ids, _ = walk([40], [20], 4)
    halves = [frozenset(epoch.tolist()) for epoch in ids]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(40)) and halves[0] not in halves[2:]


# ---- one source, as it always was


PLAIN = "f729e5440994fcb7ab60f4b1b495638160c222f9feda836cdf4c46e77ca40822"
PLAIN_SAMPLES = "3ef988779d9232c8d9e28d079e15355bbe96fea250b3850474f82df432bb7846"


def test_the_order_of_one_source_is_that_of_earlier_versions():
    found = hashlib.sha256()
    for count in (1, 2, 50, 1000, 100_003, 15_061_515):
        for seed in (0, 7):
            found.update(Order(count, seed).at(np.arange(3000)).tobytes())
    assert found.hexdigest() == PLAIN


def test_the_samples_of_one_source_are_those_of_earlier_versions(tmp_path):
    """Which, in which epoch, with which crops; two are bad."""
    images = [encode(photo(i, 60 + i, 110 - i), quality=90) for i in range(20)]
    images[4] = images[11] = b"not a picture"
    reader = SampleReader(write_records(tmp_path / "train", images), 3, (32, 32), views=2)
    rows = []
    for sample in reader.read(np.arange(70)):
        replaced = sample.fault and (sample.fault.position, sample.fault.reason)
        rows.append((sample.id, sample.epoch, [tuple(map(int, crop)) for crop in sample.crops], replaced))
    assert hashlib.sha256(repr(rows).encode()).hexdigest() == PLAIN_SAMPLES


@pytest.mark.parametrize("factors", [None, "1", "1.0"])
def test_one_source_with_the_factor_1_is_itself(records, factors):
    path = str(records["a"].files[0].prefix)
    found = open_mixture(path, factors, None, RecordSet)
    assert type(found) is RecordSet and type(make_order(found, 0)) is Order
    assert identify(found) == {"count": 30, "digest": records["a"].digest}


# ---- records


@pytest.fixture(scope="module")
def records(new_folder) -> dict[str, RecordSet]:
    """a: 30 records; b: 10, of which two are bad; one; thin: with one text."""
    folder = new_folder("mixture")
    images = [encode(photo(i, 60 + i, 110 - i), quality=90) for i in range(41)]
    bad = [image if i not in (2, 7) else b"nothing" for i, image in enumerate(images[30:40])]
    label = lambda begin: lambda i: tokens_of(begin + i)  # noqa: E731
    return {
        "a": write_records(folder / "a", images[:30]),
        "b": write_records(folder / "b", bad, label(30)),
        "good": write_records(folder / "good", images[30:40], label(30)),
        "one": write_records(folder / "one", images[40:], label(40)),
        "thin": write_records(folder / "thin", images[:5], lambda i: tokens_of(i)[:77]),
    }


def mix(records: dict, *names: str, factors: str | None = None, texts: int | None = None) -> Mixture:
    shares = parse_factors(factors or "::".join("1" for _ in names))
    return Mixture([Source(name, records[name], share) for name, share in zip(names, shares)], texts)


def columns(batches) -> list[tuple]:
    return [
        (i, epoch, text, image.numpy().tobytes())
        for batch in batches
        for i, epoch, text, image in zip(
            batch.ids.tolist(), batch.epochs.tolist(), batch.text[:, :, 5].tolist(), batch.image
        )
    ]


def test_batches_hold_the_mixture(records):
    mixture = mix(records, "a", "good", "one", factors="0.5::2::4")
    assert (len(mixture), mixture.epoch_samples) == (41, 39)
    found = columns(make(mixture, global_batch=13, steps=6, workers=0))
    ids, passes = make_order(mixture, 3).find(np.arange(78))
    assert [(i, epoch) for i, epoch, *_ in found] == list(zip(ids.tolist(), passes.tolist()))
    assert all(text == [i, i + 1000, i + 2000] for i, _, text, _ in found)
    assert mixture.name(35).endswith("good.rec key 5") and mixture.source_of(40) == "one"


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_workers_ranks_and_resumption_do_not_matter(records, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed (pip install -e '.[dali]')")
    mixture, settings = mix(records, "a", "b", "one", factors="0.5::2::4"), {"loader": loader, "global_batch": 12}
    whole = columns(make(mixture, steps=6))
    for more in ({"workers": 2}, {"workers": 1, "views": 1}):
        assert columns(make(mixture, steps=6, **settings, **more)) == whole
    ranks = [list(make(mixture, steps=6, rank=rank, world=2, **settings)) for rank in (0, 1)]
    assert columns(batch for pair in zip(*ranks) for batch in pair) == whole
    for start in (1, 24, 47):
        resumed = make(mixture, start=start, steps=2, workers=1, **settings)
        assert columns(resumed) == whole[start : start + 24]


def test_a_record_that_comes_again_in_an_epoch_looks_and_reads_otherwise(records):
    mixture = mix(records, "a", "one", factors="3::6")
    found = columns(make(mixture, global_batch=mixture.epoch_samples, steps=1, image_size=24))
    for i in (*range(30), 30):
        own = [(epoch, image) for number, epoch, _, image in found if number == i]
        times = 3 if i < 30 else 6
        assert sorted(epoch for epoch, _ in own) == list(range(times)) and len({image for _, image in own}) == times
    drawn = draw_texts(3, np.array([f[1] for f in found]), np.array([f[0] for f in found]), 3)
    assert len({tuple(drawn[[f[0] == i for f in found]]) for i in range(30)}) > 10


def turns_at(order: Order | MixedOrder, position: int) -> list[tuple[int, int]]:
    """(record, pass) at a position, and those of the records that may stand in for it, as far as tests need them."""
    (index,), (turn,) = order.find(np.array([position]))
    return [(int(index), int(turn)), *(order.stand_in(position, number) for number in range(1, 25))]


def test_a_bad_record_gives_its_place_to_one_of_its_source(records):
    mixture = mix(records, "a", "b", factors="1::4")
    loader = make(mixture, global_batch=14, steps=10, max_bad=99)
    found = columns(loader)
    for epoch in (found[:70], found[70:]):
        assert sum(i < 30 for i, *_ in epoch) == 30 and sum(i >= 30 for i, *_ in epoch) == 40
    assert not {32, 37} & {i for i, *_ in found}
    assert loader.skipped == {"image unreadable in b": 16} and all("b.rec key" in name for name in loader.bad)
    order = make_order(mixture, 3)
    for position, (i, epoch, *_) in enumerate(found):
        turns = [
            tuple(x.item() for x in order.find(np.int64(position))),
            *(order.stand_in(position, t) for t in range(1, 9)),
        ]
        assert (i, epoch) == next(pair for pair in turns if pair[0] not in (32, 37))


def test_records_in_a_row_that_do_not_decode(records, tmp_path):
    """Their headers are good; each place goes to the first in order that decodes."""
    images = [encode(photo(i, 60, 50), quality=90) for i in range(12)]
    cut = [image[: len(image) // 2] if i % 4 else image for i, image in enumerate(images)]
    own = {**records, "cut": write_records(tmp_path / "cut", cut)}
    for mixture in (own["cut"], mix(own, "a", "cut", factors="0.4::2")):
        first = len(mixture) - 12
        order, found = make_order(mixture, 3), columns(make(mixture, global_batch=12, steps=3, max_bad=99))
        for position, (i, epoch, *_) in enumerate(found):
            turns = turns_at(order, position)
            assert (i, epoch) == next(pair for pair in turns if pair[0] < first or (pair[0] - first) % 4 == 0)


def test_bad_records_are_named_by_source_when_they_are_too_many(records):
    with pytest.raises(DataError, match=r"2 of 14 records are bad \(2 image unreadable in b\)"):
        list(make(mix(records, "a", "b", factors="0.1::1.1"), global_batch=14, steps=1, max_bad=1))


def test_a_source_of_bad_records_only_ends_the_run(records, tmp_path):
    nothing = {**records, "nothing": write_records(tmp_path / "nothing", [b"x"] * 3)}
    with pytest.raises(DataError, match=r"no good record among the 1000 after position \d+, where .*nothing.rec key"):
        list(make(mix(nothing, "a", "nothing"), global_batch=33, steps=1))


def test_facts_of_a_mixture(records):
    mixture = mix(records, "a", "one", factors="0.5::5")
    assert describe_shares(mixture) == [
        "source a: 30 records x 0.5 = 15 samples an epoch, 75.00%",
        "source one: 1 record x 5 = 5 samples an epoch, 25.00%",
    ]
    facts = identify(mixture)
    own = {"name": "a", "count": 30, "digest": records["a"].digest, "factor": 0.5, "samples": 15}
    assert facts["sources"][0] == own and facts["count"] == 31
    both = [("a", "one"), ("one", "a")]
    digests = {mix(records, *names, factors=factors).digest for names in both for factors in ("1::2", "2::1")}
    assert len(digests) == 4, "content, order and shares count"
    assert len(mixture.files) == 2 and mixture.layout.width == 231


def test_the_largest_id_of_all_sources_is_found(records):
    copies = {name: write_like(records[name]) for name in ("a", "good")}
    mixture = mix(copies, "a", "good")
    assert mixture.limit_vocab(5000) == 0 and mixture.limit_vocab(50) == 2039
    assert {part.vocab_size for part in (mixture, *copies.values())} == {50}


# ---- settings


def test_sources_with_other_numbers_of_texts(records):
    with pytest.raises(ConfigError, match=r"texts per image: 3 in a \(raw, .*1 in thin \(raw\); use --texts 1"):
        mix(records, "a", "thin")
    with pytest.raises(ConfigError, match="and --texts asks for 2; use --texts 1"):
        mix(records, "a", "thin", texts=2)
    (batch,) = make(mix(records, "a", "thin", texts=1), global_batch=35, steps=1)
    assert batch.text.shape == (35, 1, 77)


def test_names_of_texts(records):
    other = write_like(records["thin"], "caption")
    assert mix({**records, "other": other}, "thin", "other").text_names == ("raw|caption",)
    assert mix(records, "a", "good", texts=2).text_names == ("raw", "synthetic")


def write_like(records: RecordSet, *names: str, **facts) -> RecordSet:
    """The same records with other facts in their layout."""
    copy = RecordSet(records.files[0].prefix)
    copy.layout = replace(copy.layout, text_names=names or copy.layout.text_names, **facts)
    return copy


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"context": 64}, "sources differ in tokens per text: 77 in a, 64 in b; build them with the same --context"),
        ({"tokenizer": "bert"}, "sources differ in tokenizer: clip in a, bert in b"),
        ({"vocab_size": 9}, "sources differ in vocabulary: 5 in a, 9 in b"),
        ({"tokenizer": None, "vocab_size": None}, None),
    ],
    ids=str,
)
def test_sources_that_do_not_agree(records, facts, words):
    known = {"tokenizer": "clip", "vocab_size": 5}
    sources = {"a": write_like(records["a"], **known), "b": write_like(records["a"], **known | facts)}
    if words is None:
        assert len(mix(sources, "a", "b")) == 60
    else:
        with pytest.raises(ConfigError, match=words):
            mix(sources, "a", "b")


@pytest.mark.parametrize(
    "factors, words",
    [
        ("x", "'x' of 'x' is not a number; write 2::1"),
        ("", "'' of '' is not a number"),
        ("2::", "'' of '2::' is not a number"),
        ("2:1", "'2:1' of '2:1' is not a number"),
        ("2,1", "'2,1' of '2,1' is not a number"),
        ("1::0", "0 in '1::0' takes nothing of its source; leave the source out"),
        ("0.0::1", "takes nothing"),
        ("1e-999::1", "takes nothing"),
        ("-1::1", "-1 in '-1::1' must be more than 0 and at most 1,000,000"),
        ("nan::1", "nan in"),
        ("inf::1", "inf in"),
        ("1e9::1", "1e9 in"),
        ("1e999999999::1", "at most 1,000,000"),
        ("9" * 5000, "at most 1,000,000"),
    ],
)
def test_factors_that_are_none(factors, words):
    with pytest.raises(ConfigError) as caught:
        parse(DataSettings, {"train_data_upsampling_factors": factors})
    assert words in str(caught.value) and all(
        line.startswith("train_data_upsampling_factors: ") for line in caught.value.problems
    )


def test_all_wrong_factors_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(DataSettings, {"train_data_upsampling_factors": "a::0::-3::2"})
    assert len(caught.value.problems) == 3


def test_factors_are_what_is_written():
    assert parse_factors("2::0.1::1e-3:: 0.3 ") == [2, Fraction(1, 10), Fraction(1, 1000), Fraction(3, 10)]


@pytest.mark.parametrize(
    "factor, samples", [("0.1", 1), ("0.3", 2), ("0.5", 3), ("0.49999", 2), ("1.1", 6), ("1000000", 5_000_000)]
)
def test_samples_are_rounded_and_halves_go_up(records, factor, samples):
    assert Source("thin", records["thin"], parse_factors(factor)[0]).samples == samples


@pytest.mark.parametrize(
    "spec, factors, words",
    [
        ("a::b", "2::1::3", "3 in '2::1::3' is for a source that is not there; train_data has 2 sources (a, b)"),
        ("a", "2::1", "1 in '2::1' is for a source that is not there; train_data has 1 source (a)"),
        ("a::b", "2", "'2' has no factor for 'b'; give one for each source, 1 to keep it"),
        ("a::", None, "train_data: 'a::' has an empty source"),
        ("::", None, "train_data: '::' has an empty source"),
        ("a::b::a", None, "train_data: the source 'a' is there 2 times; give it a factor"),
        ("a::one", "1::0.4", "0.4 of 1 record in one rounds to no sample an epoch; use at least 0.5, or leave it out"),
    ],
)
def test_what_does_not_fit_is_named(records, spec, factors, words):
    with pytest.raises(ConfigError) as caught:
        open_mixture(spec, factors, None, lambda name: records[name])
    assert words in str(caught.value) and len(caught.value.problems) == 1


def test_a_name_with_the_separator_in_it_is_one_source(records, tmp_path):
    write_records(tmp_path / "x::y", [encode(photo(0, 20, 20))] * 4)
    for name in ("x::y", "x::y.rec"):
        assert type(open_mixture(str(tmp_path / name), None, None, RecordSet)) is RecordSet
    found = open_mixture(f"{tmp_path / 'x::y'}", "2", None, RecordSet)
    assert isinstance(found, Mixture) and found.epoch_samples == 8
