"""Loaders from flat settings."""

from rwkv_clip.data.records import RecordSet
from rwkv_clip.training.data import make_loader
from rwkv_clip.training.data.batch import Loader, Plan
from rwkv_clip.training.settings import DataSettings

PLAN = ("global_batch", "steps", "start", "rank", "world")


def make(records: RecordSet, *, image_size=32, seed=3, views=1, device="cpu", **settings) -> Loader:
    """A torch loader of this process, unless the settings say otherwise: names of `Plan` and of the data settings."""
    plan = {"global_batch": 12, "steps": 6} | {name: settings.pop(name) for name in PLAN if name in settings}
    chosen = DataSettings(**{"workers": 0, "loader": "torch"} | settings)
    return make_loader(records, Plan(**plan), image_size, chosen, seed=seed, views=views, device=device)
