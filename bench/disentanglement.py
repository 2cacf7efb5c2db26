"""A disentanglement map beside its forward passes alone: `python -m bench.disentanglement [--points 21]`.

An encoder of MiniLM's size (6 layers of width 384, 22 million parameters), two task vectors and tokens, all
of them random: time depends on none of it. Prints one JSON object; `ratio` is to be at most 1.2. Interrupted,
or with `--seconds`, it tells of the first part of a map.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


class Stopped(Exception):
    """A map took as long as it may."""


@dataclass
class Spent:
    """Seconds of one map, and of its forward passes alone: each runs once more right after it, so that both
    meet the same drift of the machine."""

    clock: Callable[[], float]
    predict: Callable[[int], Tensor]
    most_s: float = math.inf
    start: float = 0.0
    alone_s: float = 0.0
    map_s: float = 0.0
    n_forward: int = 0

    def __call__(self, task: int) -> Tensor:
        found = self.predict(task)
        between = self.clock()
        self.predict(task)
        end = self.clock()
        self.map_s = between - self.start - self.alone_s
        self.alone_s += end - between
        self.n_forward += 1
        if end - self.start > self.most_s:
            raise Stopped
        return found

    @property
    def ratio(self) -> float:
        return self.map_s / self.alone_s if self.alone_s else math.nan


def measured(
    points: int,
    texts: int,
    length: int,
    rounds: int,
    clock: Callable[[], float],
    most_s: float = math.inf,
) -> dict[str, object]:
    """Maps with their forward passes alone, and the median of their ratios.

    A round that is interrupted, or takes longer than `most_s`, is the last, and its figures are of a part.
    """
    torch.manual_seed(0)
    model = Encoder(length).eval()
    deltas = [{n: 0.01 * torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)]
    tokens = [torch.randint(VOCABULARY, (texts, length)) for _ in range(2)]
    axis = torch.linspace(-3, 3, points).tolist()

    def predict(task: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part) for part in tokens[task].split(_BATCH)]).argmax(-1)

    found: list[Spent] = []
    complete = False
    with tvfast.LiveMerge(model, deltas=deltas) as live:
        predict(0)
        try:
            for _ in range(rounds):
                found.append(Spent(clock, predict, most_s, clock()))
                analysis.disentanglement(live, found[-1], first=axis)
            complete = True
        except (Stopped, KeyboardInterrupt):
            found = [one for one in found if one.n_forward]
            if not found:
                raise
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "points": points,
        "texts_per_task": texts,
        "tokens_per_text": length,
        "complete": complete,
        "n_forward": [one.n_forward for one in found],
        "map_s": statistics.median(one.map_s for one in found),
        "forward_s": statistics.median(one.alone_s for one in found),
        "ratio": statistics.median(one.ratio for one in found),
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a round, at most; then it ends")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of time on the clock: beside other work",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt
    try:
        found = measured(
            options.points, options.texts, options.length, options.rounds, clock, options.seconds
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps({"threads": options.threads, "cpu_time": options.cpu_time, **found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
