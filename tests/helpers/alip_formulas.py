"""ALIP's objective as its formulas are printed: whole matrices, plain numbers for the running means. To be read beside
the paper (Yang et al. 2023, arXiv 2308.08428) and the released code's rules; what ours is tested against."""

import torch
import torch.nn.functional as F

BATCH, WIDTH, STEPS = 24, 6, 3


class ReferenceALIP:
    """H begins as plain numbers; each call is one step of one process with the whole batch."""

    def __init__(self, init=1, momentum=0.99, gamma_s=2, gamma_p=2):
        self.H_tc = self.H_xt = self.H_xc = init
        self.momentum, self.gamma_s, self.gamma_p = momentum, gamma_s, gamma_p

    def means(self) -> list[float]:
        return [float(H) for H in (self.H_tc, self.H_xt, self.H_xc)]

    def __call__(self, x, t, c, s):
        """x, t, c: (N, D) normalised features of image, raw text and caption; s: scale.

        -> losses by name, what the log says, and u (N,), which decides the branch."""
        m = self.momentum
        with torch.no_grad():
            S_tc, S_xt, S_xc = (t * c).sum(1), (x * t).sum(1), (x * c).sum(1)
            self.H_tc = m * self.H_tc + (1 - m) * S_tc.mean()
            self.H_xt = m * self.H_xt + (1 - m) * S_xt.mean()
            self.H_xc = m * self.H_xc + (1 - m) * S_xc.mean()
            u = torch.exp(S_tc - self.H_tc) ** self.gamma_s
            Ws = torch.minimum(u, torch.ones_like(u))
            Wt, Wc = torch.ones_like(u), torch.ones_like(u)
            for i in range(len(u)):
                if u[i] < 1:
                    Wt[i] = torch.exp(S_xt[i] - self.H_xt) ** self.gamma_p
                    Wc[i] = torch.exp(S_xc[i] - self.H_xc) ** self.gamma_p
        losses = {
            "raw_loss": (Ws * Wt * self.pair_loss(x, t, s)).mean(),
            "caption_loss": (Ws * Wc * self.pair_loss(x, c, s)).mean(),
        }
        report = {}
        for name, S, H, W in (
            ("text", S_tc, self.H_tc, Ws),
            ("raw", S_xt, self.H_xt, Wt),
            ("caption", S_xc, self.H_xc, Wc),
        ):
            report |= {
                f"current_{name}_sim": float(S.mean()),
                f"momentum_{name}_sim": float(H),
                f"weight_{name}_mean": float(W.mean()),
            }
        return losses, report, {"u": u, "Wt": Wt, "Wc": Wc}

    @staticmethod
    def pair_loss(a, b, s):
        """(N,): cross-entropy of each pair among its row and among its column."""
        scores, own = s * a @ b.T, torch.arange(len(a))
        rows, columns = F.cross_entropy(scores, own, reduction="none"), F.cross_entropy(scores.T, own, reduction="none")
        return (rows + columns) / 2


def features(step: int, dtype: torch.dtype, batch: int = BATCH) -> list[torch.Tensor]:
    """Images, raw texts, captions and scale; texts agree with it more or less."""
    g = torch.Generator().manual_seed(step)
    image = torch.randn(batch, WIDTH, generator=g, dtype=torch.float64)
    texts = [image + k * torch.randn(batch, WIDTH, generator=g, dtype=torch.float64) for k in (1.0, 2.0)]
    leaves = [F.normalize(part, dim=-1) for part in (image, *texts)]
    return [x.to(dtype).requires_grad_() for x in (*leaves, torch.tensor(5.0 + step, dtype=torch.float64))]
