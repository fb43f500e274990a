"""Misuse of the operators is a ValueError, never a crash: the native kernels take pointers and believe every shape."""

import os

import pytest
import torch

from rwkv_clip.losses.pairs import contrastive_losses, pair_losses
from rwkv_clip.ops import wkv6
from rwkv_clip.ops.block.pointwise import mix_tokens, norm_gate, relu_square, sigmoid_gate
from rwkv_clip.ops.block.shift import shift_tokens

X, C, S = torch.ones(2, 4, 8), torch.ones(3, 8), torch.ones(3, 2, 4, 8)
W, F, ONE = torch.ones(8), torch.ones(4, 6), torch.tensor(2.0)
R, U = torch.ones(2, 5, 2, 4), torch.ones(2, 4)

CASES = {
    "mix heads 3": lambda: mix_tokens(X, C, None, 3, (4,)),
    "mix heads 0": lambda: mix_tokens(X, C, None, 0, (4,)),
    "mix heads -2": lambda: mix_tokens(X, C, None, -2, (4,)),
    "mix grid beyond the tokens": lambda: mix_tokens(X, C, None, 2, (9,)),
    "mix image beyond the tokens": lambda: mix_tokens(X, C, None, 2, (4, 4)),
    "mix grid 0": lambda: mix_tokens(X, C, None, 2, (0,)),
    "mix grid negative": lambda: mix_tokens(X, C, None, 2, (-2, -2)),
    "mix grid empty": lambda: mix_tokens(X, C, None, 2, ()),
    "mix grid of three": lambda: mix_tokens(X, C, None, 2, (1, 2, 2)),
    "mix coefficients narrow": lambda: mix_tokens(X, C[:, :4], None, 2, (4,)),
    "mix coefficients wide": lambda: mix_tokens(X, torch.ones(3, 16), None, 2, (4,)),
    "mix coefficients flat": lambda: mix_tokens(X, C[0], None, 2, (4,)),
    "mix no coefficients": lambda: mix_tokens(X, C[:0], None, 2, (4,)),
    "mix coefficients int": lambda: mix_tokens(X, C.long(), None, 2, (4,)),
    "mix coefficients elsewhere": lambda: mix_tokens(X, C.to("meta"), None, 2, (4,)),
    "mix offsets too few": lambda: mix_tokens(X, C, S[:2], 2, (4,)),
    "mix offsets short": lambda: mix_tokens(X, C, S[:, :, :2], 2, (4,)),
    "mix offsets elsewhere": lambda: mix_tokens(X, C, S.to("meta"), 2, (4,)),
    "mix x flat": lambda: mix_tokens(X[0], C, None, 2, (4,)),
    "mix x int": lambda: mix_tokens(X.long(), C, None, 2, (4,)),
    "mix x none": lambda: mix_tokens(None, C, None, 2, (4,)),
    "mix head of 3": lambda: mix_tokens(X[..., :6], C[:, :6], None, 2, (4,)),
    "mix image head of 2": lambda: mix_tokens(X[..., :4], C[:, :4], None, 2, (2, 2)),
    "gate short": lambda: norm_gate(X, X[:1], W, W, 2, 1e-5),
    "gate narrow": lambda: norm_gate(X, X[..., :4], W, W, 2, 1e-5),
    "gate elsewhere": lambda: norm_gate(X, X.to("meta"), W, W, 2, 1e-5),
    "norm heads 3": lambda: norm_gate(X, X, W, W, 3, 1e-5),
    "norm heads 0": lambda: norm_gate(X, X, W, W, 0, 1e-5),
    "norm weight short": lambda: norm_gate(X, X, W[:4], W, 2, 1e-5),
    "norm bias short": lambda: norm_gate(X, X, W, W[:4], 2, 1e-5),
    "norm weight elsewhere": lambda: norm_gate(X, X, W.to("meta"), W, 2, 1e-5),
    "norm flat": lambda: norm_gate(X[0], X[0], W, W, 2, 1e-5),
    "norm int": lambda: norm_gate(X.long(), X, W, W, 2, 1e-5),
    "square none": lambda: relu_square(None),
    "square int": lambda: relu_square(X.long()),
    "sigmoid short": lambda: sigmoid_gate(X[:1], X),
    "sigmoid elsewhere": lambda: sigmoid_gate(X.to("meta"), X),
    "shift heads 0": lambda: shift_tokens(X, 0, (4,)),
    "shift grid beyond": lambda: shift_tokens(X, 2, (5,)),
    "shift grid empty": lambda: shift_tokens(X, 2, ()),
    "wkv6 list": lambda: wkv6([1], R, R, R, U),
    "wkv6 batch": lambda: wkv6(R, R[:1], R, R, U),
    "wkv6 u": lambda: wkv6(R, R, R, R, U[:1]),
    "wkv6 no tokens": lambda: wkv6(*[R[:, :0]] * 4, U),
    "wkv6 int": lambda: wkv6(*[R.long()] * 4, U),
    "wkv6 backend": lambda: wkv6(R, R, R, R, U, "magic"),
    "pairs first beyond": lambda: pair_losses(F, F, ONE, 3),
    "pairs first negative": lambda: pair_losses(F, F, ONE, -1),
    "pairs fewer texts": lambda: pair_losses(F, F[:2], ONE, 0),
    "pairs width": lambda: pair_losses(F, F[:, :3], ONE, 0),
    "pairs dtype": lambda: pair_losses(F, F.double(), ONE, 0),
    "pairs scale": lambda: pair_losses(F, F, torch.ones(6), 0),
    "pairs none": lambda: pair_losses(F[:0], F, ONE, 0),
    "losses int": lambda: contrastive_losses(F.long(), F.long(), ONE),
    "losses scale": lambda: contrastive_losses(F, F, torch.ones(6)),
    "losses None": lambda: contrastive_losses(None, F, ONE),
}


@pytest.mark.parametrize("grad", [True, False])
def test_every_misuse_is_a_value_error(grad):
    """In a process of its own, which a crash would end: with and without gradients the calls take different ways."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        wrong = "crashed "
        try:
            for name, call in CASES.items():
                os.write(writer, f"{name}\n".encode())
                try:
                    with torch.set_grad_enabled(grad):
                        call()
                    wrong = f"{name}: taken"
                    break
                except ValueError as error:
                    assert len(str(error)) > 20 and "unpack" not in str(error), name
            else:
                wrong = "ok"
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        os.write(writer, wrong.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        lines = stream.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0, f"crashed at {lines[-1]}"
    assert lines == [*CASES, "ok"], lines[-2:]


OPERATORS = {
    "mix": lambda x: mix_tokens(x, C * 0.3, torch.stack([x] * 3), 2, (4,)),
    "mix image": lambda x: mix_tokens(x, C * 0.3, None, 2, (2, 2)),
    "norm gate": lambda x: [norm_gate(x, x, W, W, 2, 1e-5)],
    "square": lambda x: [relu_square(x)],
    "sigmoid": lambda x: [sigmoid_gate(x, x)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_empty_and_poisoned(name, monkeypatch):
    run, x = OPERATORS[name], torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))

    def results(x):
        leaf = x.detach().requires_grad_()
        outs = run(leaf)
        (gradient,) = torch.autograd.grad(sum(out.square().sum() for out in outs), leaf)
        return [*outs, gradient, *(out for out in run(x.detach()))]

    expected = results(x)
    for strided in (x.transpose(0, 2).contiguous().transpose(0, 2), torch.cat([x, x], -1)[..., 8:]):
        assert not strided.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(results(strided), expected))
    assert all(y.shape[0] == 0 for y in run(x[:0]))
    for maker in ("empty", "empty_like"):
        make = getattr(torch, maker)

        def poisoned(*args, make=make, **kwargs):
            fresh = make(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, maker, poisoned)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(results(x), expected))
