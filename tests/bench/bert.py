"""BERT's text tower, forward + backward of a batch of Chinese captions, beside a plain reading of the released code.

python tests/bench/bert.py [--batch 16 --context 52 --depth 12 --padding 0.64]

"plain": the definition as the released code computes it, every position of the context, attention written out.
"transformers": its BertModel with scaled_dot_product_attention, where it is installed. "ours": the tower as it runs.
padding: fraction of the context that is padding, on average.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from harness import Report, alternate, argument_parser
from torch import Tensor, nn

from rwkv_clip.models.bert import BertConfig, BertTower


class PlainLayer(nn.Module):
    """One post-norm layer over all positions."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, config.ffn_width), nn.Linear(config.ffn_width, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            part(x).view(rows, length, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, width)
        x = self.norm1(self.out(mixed) + x)
        return self.norm2(self.narrow(F.gelu(self.wide(x))) + x)


class PlainTower(nn.Module):
    """The tower over all positions, with the weights of ours."""

    def __init__(self, ours: BertTower):
        super().__init__()
        config, table = ours.config, ours.embeddings
        self.words, self.positions, self.types = (
            nn.Embedding(len(other.weight), config.width)
            for other in (table.word_embeddings, table.position_embeddings, table.token_type_embeddings)
        )
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.depth))
        self.proj = nn.Parameter(ours.proj.detach().clone())
        with torch.no_grad():  # both lists are in the order of definition
            own = [p for name, p in self.named_parameters() if name != "proj"]
            for parameter, other in zip(own, ordered(ours)):
                parameter.copy_(other)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        x = self.norm(self.words(text) + self.positions(places) + self.types(torch.zeros_like(text)))
        mask = (1 - (text != 0).to(x.dtype))[:, None, None] * -10000
        for layer in self.layers:
            x = layer(x, mask)
        return x[:, 0] @ self.proj


def ordered(ours: BertTower) -> list[Tensor]:
    """The parameters of our tower, without the projection, in the order of the plain one's."""
    found = list(ours.embeddings.parameters())
    for layer in ours.encoder["layer"]:
        branches = layer.attention["output"], layer.output
        modules = [*layer.attention["self"].values(), branches[0].dense, layer.intermediate["dense"], branches[1].dense]
        found += [p for module in (*modules, *(branch.LayerNorm for branch in branches)) for p in module.parameters()]
    return found


def make_batch(args) -> Tensor:
    """Random ids; lengths are spread evenly around their mean."""
    torch.manual_seed(0)
    mean = max(3, round(args.context * (1 - args.padding)))
    text = torch.randint(106, 21128, (args.batch, args.context))
    lengths = torch.linspace(max(2, mean // 2), min(args.context, mean + mean - mean // 2), args.batch).round()
    text[torch.arange(args.context) >= lengths[:, None]] = 0
    text[:, 0] = 101
    return text.to(args.device)


def main() -> None:
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=52)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--padding", type=float, default=0.64)
    args = parser.parse_args()
    report = Report("bert", args.device, commit=args.commit)
    ours = BertTower(BertConfig(depth=args.depth, context=args.context), 512).to(args.device).eval()
    plain, text = PlainTower(ours).to(args.device).eval(), make_batch(args)
    nets = {"plain": lambda: plain(text), "ours": lambda: ours(text)}
    grads = {}
    for name, call in nets.items():
        features = call()
        features.square().sum().backward()
        net = plain if name == "plain" else ours
        own = ordered(ours) if name == "ours" else [p for key, p in net.named_parameters() if key != "proj"]
        grads[name] = [features.detach(), *(p.grad for p in own)]
    for what, a, b in zip(("features", *(f"gradient {i}" for i in range(999))), grads["ours"], grads["plain"]):
        report.gate(what, (a - b).norm() / (b.norm() + 1e-6 * grads["plain"][1].norm()), 1e-3)
    if importlib.util.find_spec("transformers"):
        from transformers import BertConfig as Theirs
        from transformers import BertModel

        model = BertModel(Theirs(vocab_size=21128, num_hidden_layers=args.depth), add_pooling_layer=False)
        model = model.to(args.device).eval()
        mask = (text != 0).long()
        nets["transformers"] = lambda: model(text, attention_mask=mask).last_hidden_state[:, 0]

    def step(call):
        return lambda: call().square().sum().backward()

    case = f"B {args.batch} L {args.context}, {float((text == 0).float().mean()):.0%} padding"
    times = alternate({name: step(call) for name, call in nets.items()}, repeats=args.repeats, device=args.device)
    for name, seconds in times.items():
        report.add(case, name, seconds=seconds, baseline="plain", goal=1.0 if name == "ours" else None)
    report.finish(args.output)


if __name__ == "__main__":
    main()
