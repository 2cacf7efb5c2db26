"""A disentanglement map beside its forward passes alone: `python -m bench.disentanglement [--points 21]`.

An encoder of MiniLM's size (6 layers of width 384, 22 million parameters), two task vectors and tokens, all
of them random: time depends on none of it. Prints one JSON object; `ratio` is to be at most 1.2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import tvfast
from bench.environment import environment
from tvfast import analysis

LAYERS, WIDTH, HEADS, INNER, VOCABULARY, CLASSES = 6, 384, 12, 1536, 30522, 4
_BATCH = 64


class Encoder(nn.Module):
    """Token and position embeddings, a transformer, mean pooling, a linear head."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(length, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embeddings(tokens) + self.positions.weight
        logits: Tensor = self.head(self.encoder(embedded).mean(1))
        return logits


def measured(
    points: int, texts: int, length: int, rounds: int, clock: Callable[[], float]
) -> dict[str, object]:
    """Maps and plain forward passes in turn, and the median of their ratios."""
    torch.manual_seed(0)
    model = Encoder(length).eval()
    deltas = [{n: 0.01 * torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)]
    tokens = [torch.randint(VOCABULARY, (texts, length)) for _ in range(2)]
    axis = torch.linspace(-3, 3, points).tolist()

    def predict(task: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part) for part in tokens[task].split(_BATCH)]).argmax(-1)

    maps, forwards = [], []
    with tvfast.LiveMerge(model, deltas=deltas) as live:
        predict(0)
        for _ in range(rounds):
            start = clock()
            found = analysis.disentanglement(live, predict, first=axis)
            between = clock()
            for number in range(found.n_forward):
                predict(number % 2)
            maps.append(between - start)
            forwards.append(clock() - between)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "points": points,
        "texts_per_task": texts,
        "tokens_per_text": length,
        "n_forward": found.n_forward,
        "n_merges": found.n_merges,
        "map_s": statistics.median(maps),
        "forward_s": statistics.median(forwards),
        "ratio": statistics.median(a / b for a, b in zip(maps, forwards, strict=True)),
        "environment": environment(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.disentanglement", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--points", type=int, default=21, help="per axis; an odd number has 0 among them")
    parser.add_argument("--texts", type=int, default=256, help="of each task")
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of time on the clock: beside other work",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = measured(options.points, options.texts, options.length, options.rounds, clock)
    print(json.dumps({"threads": options.threads, "cpu_time": options.cpu_time, **found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
