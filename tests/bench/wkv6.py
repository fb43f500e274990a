"""Times of the WKV6 backends on this machine, alternating, medians; refuses to print a speed for a wrong result.

python tests/bench/wkv6.py [--batch 8 --repeats 9]
"""

import statistics
import time

import torch
import tyro

from rwkv_clip.ops import available_backends, wkv6

SHAPES = {"B/32 image": (49, 8, 80), "text": (77, 10, 64), "B/16 image": (196, 8, 80)}


def inputs(batch: int, t: int, h: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    r, k, v = (torch.randn(batch, t, h, n, generator=g) for _ in range(3))
    decay = torch.rand(batch, t, h, n, generator=g) * 5 - 6  # the range of fresh models
    return [x.to(dtype).requires_grad_() for x in (r, k, v, decay, torch.randn(h, n, generator=g))]


def main(batch: int = 8, repeats: int = 9) -> None:
    """batch: samples; repeats: timed runs per backend."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, B = {batch}, medians of {repeats}")
    for name, (t, h, n) in SHAPES.items():
        exact = wkv6(*(x.detach() for x in inputs(2, t, h, n, torch.float64)), backend="reference")
        times: dict[str, tuple[list[float], list[float]]] = {b: ([], []) for b in available_backends()}
        for backend in times:
            ours = wkv6(*(x.detach() for x in inputs(2, t, h, n, torch.float32)), backend=backend).double()
            error = float((ours - exact).norm() / exact.norm())
            if not error < 2e-6:
                raise SystemExit(f"{backend} is wrong at {name}: relative error {error:.1e}; no speed is printed")
        leaves = inputs(batch, t, h, n, torch.float32)
        gradient = torch.randn(batch, t, h, n)
        for _ in range(repeats):
            for backend, (forward, both) in times.items():
                start = time.perf_counter()
                with torch.no_grad():
                    wkv6(*leaves, backend=backend)
                middle = time.perf_counter()
                torch.autograd.grad(wkv6(*leaves, backend=backend), leaves, gradient)
                forward.append(middle - start)
                both.append(time.perf_counter() - middle)
        for backend, (forward, both) in times.items():
            f, b = (1e3 * statistics.median(x) for x in (forward, both))
            print(
                f"{name:12} T {t:4} H {h:3} N {n:3}  {backend:10} forward {f:7.2f} ms  forward + backward {b:7.2f} ms"
            )


if __name__ == "__main__":
    tyro.cli(main)
