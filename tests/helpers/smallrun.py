"""A training run of a millisecond per step: an MLP, AdamW, and batches that are a function of the step."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from rwkv_clip.checkpoint import find_checkpoint, list_checkpoints, read_description, read_tensors, read_weights
from rwkv_clip.training.optimizer_state import pack_state, unpack_state
from rwkv_clip.training.saver import Saver


class SmallRun:
    """Goes on from `start`, else from the newest checkpoint of `folder`; `seed` makes it another run."""

    def __init__(self, folder: Path, seed: int = 0, start: Path | None = None):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
        self.seed, self.progress = seed, 0
        self.saver = Saver(folder, keep=2)
        if folder.is_dir() and list_checkpoints(folder):
            path = find_checkpoint(start or folder)
            self.model.load_state_dict(read_weights(path))
            unpack_state(self.optimizer, dict(self.model.named_parameters()), read_tensors(path / "optim.safetensors"))
            self.progress = read_description(path)["step"]

    def step(self) -> None:
        g = torch.Generator().manual_seed(1000 * self.seed + self.progress)
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 16, generator=g)).square().mean().backward()
        self.optimizer.step()
        self.progress += 1

    def optim_tensors(self) -> dict[str, torch.Tensor]:
        return pack_state(self.optimizer, dict(self.model.named_parameters()))

    def save(self, last: bool = False) -> None:
        optim = self.optim_tensors()
        self.saver.save(self.progress, self.model.state_dict(), optim, {"samples_seen": 8 * self.progress}, last)

    def run(self, until: int) -> "SmallRun":
        """Step and save, waiting for each write, so that the files there are the same every time."""
        while self.progress < until:
            self.step()
            self.save(last=True)
        return self

    def digest(self) -> str:
        """sha256 of weights and optimizer state."""
        tensors = {**self.model.state_dict(), **self.optim_tensors()}
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(key.encode() + tensors[key].contiguous().numpy().tobytes())
        return digest.hexdigest()


def digest_folder(path: Path) -> str:
    """sha256 over names and contents of a checkpoint's files, or of everything below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        digest.update(str(file.relative_to(path)).encode())
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
