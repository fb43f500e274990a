"""A training step on a real GPU: the host never waits in it, bad numbers stay out, and the loss is float64's."""

import pytest
import torch
import torch.nn.functional as F

import rwkv_clip
from rwkv_clip.config import parse
from rwkv_clip.dist import join_world
from rwkv_clip.losses import InfoNCE
from rwkv_clip.training.data.batch import Batch
from rwkv_clip.training.faults.nonfinite import NumericsError
from rwkv_clip.training.settings import Settings
from rwkv_clip.training.state import TrainState
from rwkv_clip.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
MODEL = {
    "image": {"image_size": [64, 64], "patch": 16, "width": 64, "depth": 2, "heads": 4, "ffn_width": 128},
    "text": {"context": 8, "width": 64, "depth": 2, "heads": 4, "ffn_width": 128},
}
BATCH = 16


def make_trainer(device="cuda", **changes) -> Trainer:
    torch.manual_seed(0)
    world = join_world(device)
    model = rwkv_clip.create_model(MODEL, device=world.device, drop_path=0.2)
    settings = parse(Settings, {"batch_size": BATCH, "max_steps": 100, **changes})
    return Trainer(TrainState(model, InfoNCE(), settings, world, 1000))


def make_batch(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    image = torch.randint(256, (BATCH, 3, 64, 64), generator=g, dtype=torch.uint8)
    text = torch.randint(1, 1000, (BATCH, 3, 8), generator=g)
    return Batch(image, text, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64), step * BATCH)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits(precision):
    """torch itself raises at every read, copy or selection that the host would wait for."""
    trainer = make_trainer(precision=precision)
    for step in range(2):  # builds kernels, makes the optimizer's state
        trainer.step(make_batch(step))
    trainer.state.watch.check()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(2, 6):
            values = trainer.step(make_batch(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.state.watch.check()
    assert torch.isfinite(values["loss"])


def test_bad_numbers_stay_out(device="cuda"):
    trainer = make_trainer(device, precision="fp32")
    trainer.step(make_batch(0))
    trainer.state.watch.check()
    before = {key: value.clone() for key, value in trainer.state.model.state_dict().items()}
    trainer.pixel_statistics[0].fill_(float("nan"))
    trainer.step(make_batch(1))
    trainer.pixel_statistics[0].fill_(0.5)
    with pytest.raises(NumericsError, match="step 1: loss nan"):
        trainer.step(make_batch(2))
    assert all(torch.equal(before[key], value) for key, value in trainer.state.model.state_dict().items())


def test_loss_in_chunks(device="cuda"):
    """Two chunks and a half of the height that a GPU has."""
    g = torch.Generator().manual_seed(0)
    pair = [F.normalize(torch.randn(5120, 64, generator=g), dim=-1).to(device) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (*pair, torch.tensor(100.0, device=device))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    scores, target = exact[2] * exact[0] @ exact[1].T, torch.arange(5120, device=device)
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    found = InfoNCE()(*leaves)[0]["contrastive"]
    grads = [torch.autograd.grad(found, leaves), torch.autograd.grad(expected, exact)]
    for x, y in zip((found, *grads[0]), (expected, *grads[1])):
        assert (x.double() - y).norm() <= 2e-6 * y.norm()
