"""Models answer by name when ranks hold copies (ddp) or shards (fsdp) of them, with the bits of one process."""

import torch

import rwkv_clip
from helpers.ranks import run_ranks
from rwkv_clip.config import parse
from rwkv_clip.dist import join_world, leave_world
from rwkv_clip.training.parallel import distribute_model
from rwkv_clip.training.settings import ParallelSettings

IMAGE = {"image_size": [32, 32], "patch": 16, "width": 32, "depth": 2, "heads": 2, "ffn_width": 64}
VIT = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 2}
MODELS = [
    {"embed_dim": 16, "image": IMAGE, "text": {"kind": "open_clip", **TEXT}},
    {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
]
NEEDS = ("image", "text", "image_pooled", "text_tokens")


def answer_on_ranks() -> None:
    """On every rank: features and gradients of all models, whole and distributed."""
    world = join_world("cpu")
    torch.manual_seed(1)  # the same inputs everywhere, so that means over ranks are what one computes
    image, text = torch.randn(3, 3, 32, 32), torch.randint(1, 99, (3, 8))
    for description in MODELS:
        for way in ("ddp", "fsdp"):
            torch.manual_seed(0)
            whole = rwkv_clip.create_model(description).train()
            model = rwkv_clip.create_model(description).train()
            model.load_state_dict(whole.state_dict())
            call = distribute_model(model, torch.nn.Module(), parse(ParallelSettings, {"parallel": way}), world)
            expected, found = whole(image, text, needs=NEEDS), call(image, text, needs=NEEDS)
            assert expected.keys() == found.keys() == {*NEEDS, "logit_scale"}
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            for features in (expected, found):
                sum(value.square().sum() for value in features.values()).backward()
            for key, parameter in model.named_parameters():
                gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                whole_gradient = whole.get_parameter(key).grad
                torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-5, msg=key)
    leave_world()


def test_ddp_and_fsdp_answer_by_name(tmp_path):
    run_ranks(2, tmp_path, answer_on_ranks)
