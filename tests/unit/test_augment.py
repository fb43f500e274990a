"""Augmentation as a function: right distributions, always inside the picture, nothing but (seed, epoch,
sample)."""

import numpy as np
import pytest

from rwkv_clip.training.data.augment import crop_windows, draw_flips, draw_texts, uniforms

FROZEN_UNIFORMS = [0.8944232321903162, 0.9591454830962347, 0.9371498393298487]
FROZEN_WINDOWS = [[9, 25, 415, 349], [0, 484, 40, 50]]
FROZEN_VIEW = [[39, 0, 439, 374], [88, 7, 368, 366]]
MANY = 20_000
IDS, ZEROS = np.arange(MANY), np.zeros(MANY, np.int64)


def test_uniforms_are_uniform_and_independent():
    base = uniforms(0, 0, IDS, 0)
    assert base.min() >= 0 and base.max() < 1
    counts, _ = np.histogram(base, 100, (0, 1))
    assert ((counts - MANY / 100) ** 2 / (MANY / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)
    others = [
        uniforms(1, 0, IDS, 0),
        uniforms(0, 1, IDS, 0),
        uniforms(0, 0, IDS, 1),
        uniforms(0, 0, IDS + 1, 0),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
    swapped = (
        uniforms(0, 3, np.array([4]), 5),
        uniforms(0, 4, np.array([3]), 5),
        uniforms(0, 3, np.array([5]), 4),
    )
    assert len({float(value[0]) for value in swapped}) == 3


def test_numbers_are_frozen():
    # A run resumed by a later version must see the same crops and texts.
    assert uniforms(7, 1, np.array([0, 1, 123456]), 2).tolist() == FROZEN_UNIFORMS
    windows = crop_windows(np.array([500, 40]), np.array([375, 640]), 7, np.array([0, 3]), np.array([5, 6]))
    assert windows.tolist() == FROZEN_WINDOWS


def test_views_have_draws_of_their_own():
    sizes = np.full(MANY, 500), np.full(MANY, 375)
    windows = [crop_windows(*sizes, 7, ZEROS, IDS, view=view) for view in range(3)]
    assert np.array_equal(windows[0], crop_windows(*sizes, 7, ZEROS, IDS))
    flips = [draw_flips(7, ZEROS, IDS, view=view) for view in range(3)]
    assert np.array_equal(flips[0], draw_flips(7, ZEROS, IDS))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        for column in range(4):
            assert abs(np.corrcoef(windows[left][:, column], windows[right][:, column])[0, 1]) < 0.03
        assert abs(np.corrcoef(flips[left], flips[right])[0, 1]) < 0.03
    assert windows[1][:2].tolist() == FROZEN_VIEW


def test_a_sample_does_not_see_its_batch():
    epochs, widths, heights = IDS % 3, 100 + IDS % 500, 100 + IDS % 311
    whole = crop_windows(widths, heights, 1, epochs, IDS)
    some = np.random.default_rng(0).permutation(MANY)[:50]
    assert np.array_equal(crop_windows(widths[some], heights[some], 1, epochs[some], IDS[some]), whole[some])
    assert np.array_equal(draw_texts(1, epochs[some], IDS[some], 3), draw_texts(1, epochs, IDS, 3)[some])
    assert np.array_equal(draw_flips(1, epochs[some], IDS[some]), draw_flips(1, epochs, IDS)[some])
    one = crop_windows(widths[7:8], heights[7:8], 1, epochs[7:8], IDS[7:8])
    assert np.array_equal(one[0], whole[7])


def test_windows_lie_inside_every_picture():
    random = np.random.default_rng(0)
    sides = np.concatenate([random.integers(1, 6, MANY // 2), random.integers(1, 33_000, MANY // 2)])
    widths, heights = random.permutation(sides), random.permutation(sides)
    x, y, width, height = crop_windows(widths, heights, 3, ZEROS, IDS).T
    assert min(x.min(), y.min()) >= 0 and min(width.min(), height.min()) >= 1
    assert (x + width <= widths).all() and (y + height <= heights).all()


def test_area_aspect_and_place():
    x, y, width, height = crop_windows(ZEROS + 1000, ZEROS + 1000, 0, ZEROS, IDS).T
    share, ratio = width * height / 1e6, width / height
    assert share.min() > 0.698 and share.max() <= 1 and ratio.min() > 0.798 and ratio.max() < 1.253
    assert share.mean() == pytest.approx(0.808, abs=0.003)  # as DALI: large areas fit less often
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.003)
    free = (width < 950) & (height < 950)
    across, down = x[free] / (1000 - width[free]), y[free] / (1000 - height[free])
    for place in (across, down):
        assert place.mean() == pytest.approx(0.5, abs=0.015)
        assert place.std() == pytest.approx(12**-0.5, abs=0.01)
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.03


def test_too_wide_and_too_tall_pictures_get_the_largest_allowed_shape():
    x, y, width, height = crop_windows(ZEROS + 1000, ZEROS + 300, 0, ZEROS, IDS).T
    assert set(width) == {375} and set(height) == {300} and set(y) == {0}
    assert x.min() < 5 and x.max() > 620
    x, y, width, height = crop_windows(ZEROS + 200, ZEROS + 900, 0, ZEROS, IDS).T
    assert set(width) == {200} and set(height) == {250} and set(x) == {0}


@pytest.mark.parametrize(
    "probs", [(0.5, 0.25, 0.25), (0.1, 0.9), (0, 1, 0), (1, 0), (0, 0, 0.3, 0.7, 0), (1.0,)], ids=str
)
def test_texts_are_drawn_by_their_probabilities(probs):
    drawn = draw_texts(0, ZEROS, IDS, len(probs), probs)
    counts = np.bincount(drawn, minlength=len(probs))
    expected = MANY * np.array(probs)
    assert len(counts) == len(probs) and (counts[expected == 0] == 0).all()
    assert ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum() < 25
    assert np.array_equal(draw_texts(0, ZEROS[::-1], IDS[::-1], len(probs), probs), drawn[::-1])


def test_probabilities_that_end_a_rounding_below_1_have_no_text_of_probability_0(monkeypatch):
    monkeypatch.setattr("rwkv_clip.training.data.augment.uniforms", lambda *_: np.array([0.0, 1 - 2.0**-53]))
    assert draw_texts(0, ZEROS, IDS, 4, [0, 0.7, 0.3 - 1e-7, 0]).tolist() == [1, 2]


def test_flips_and_texts_are_fair():
    assert draw_flips(0, ZEROS, IDS).mean() == pytest.approx(0.5, abs=0.015)
    for views in (1, 2, 3, 5):
        counts = np.bincount(draw_texts(0, ZEROS, IDS, views), minlength=views)
        assert len(counts) == views
        assert ((counts - MANY / views) ** 2 / (MANY / views)).sum() < 25
    later = np.stack([draw_texts(0, ZEROS + epoch, IDS, 3) for epoch in range(3)])
    assert ((later[0] == later[1]).mean()) == pytest.approx(1 / 3, abs=0.02)  # epochs draw anew
