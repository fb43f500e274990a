"""const-cooldown: the learning rates of open_clip's own scheduler, step by step."""

from types import SimpleNamespace

import pytest
from open_clip_train.scheduler import const_lr_cooldown

from rwkv_clip.config import ConfigError, parse
from rwkv_clip.training.optim import Schedule
from rwkv_clip.training.settings import OptimizerSettings


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("end", [0.0, 1e-5])
@pytest.mark.parametrize("warmup, epochs, cooldown", [(0, 3, 1), (5, 3, 1), (5, 4, 4), (25, 3, 2), (7, 2, 0)])
def test_rates_are_open_clips(warmup, epochs, cooldown, power, end):
    per_epoch, peak = 10, 5e-4
    theirs = const_lr_cooldown(
        SimpleNamespace(param_groups=[]), peak, warmup, epochs * per_epoch, cooldown * per_epoch, power, end
    )
    settings = {
        "schedule": "const-cooldown",
        "lr": peak,
        "warmup": warmup,
        "epochs": epochs,
        "epochs_cooldown": cooldown,
    }
    settings |= {"lr_cooldown_end": end, "lr_cooldown_power": power}
    total = epochs * per_epoch
    schedule = Schedule.from_settings(parse(OptimizerSettings, settings), total, per_epoch)
    found = [schedule.lr(step) for step in range(total)]
    assert found == pytest.approx([theirs(step) for step in range(total)], rel=1e-12)
    assert min(found) > 0


def test_a_part_of_an_epoch():
    settings = parse(OptimizerSettings, {"schedule": "const-cooldown", "epochs_cooldown": 0.25, "warmup": 0, "lr": 1.0})
    schedule = Schedule.from_settings(settings, 30, 20)
    assert [schedule.lr(step) for step in (24, 25, 27, 29)] == pytest.approx([1.0, 1.0, 0.6, 0.2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "const-cooldown"}, "epochs_cooldown: not set"),
        ({"epochs_cooldown": 1}, "epochs_cooldown: is for schedule const-cooldown, not cosine"),
        ({"lr_cooldown_end": 1e-5}, "lr_cooldown_end: is for schedule const-cooldown"),
        ({"lr_cooldown_power": 2}, "lr_cooldown_power: is for schedule const-cooldown"),
        ({"schedule": "const-cooldown", "epochs": 2, "epochs_cooldown": 3}, "epochs_cooldown: 3 of 2 epochs"),
        (
            {"schedule": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_end": 1.0},
            "lr_cooldown_end: 1 is more than",
        ),
        ({"schedule": "const_cooldown"}, "'const_cooldown' is not one of"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(OptimizerSettings, changes)
