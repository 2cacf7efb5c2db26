"""How often a threshold can be guessed from a sample, and what a merge with guesses then reads.

`python bench/quality/guess_odds.py`: a 4096 x 4096 tensor in bfloat16, a base of standard deviation 0.02 and
three fine-tunes whose steps have the standard deviation `step`, alike everywhere or with rows of different
size, is sampled many times as `csrc/cuda/select.cu` does it. Prints the share of entries that equal the
threshold, how often all three thresholds are guessed, how often all guesses are right, and the bytes for each
parameter that TIES of three models then moves: 18 without guesses, 10 with thresholds known before.
"""

from __future__ import annotations

import numpy as np
import torch

SIDE = 4096
N = SIDE * SIDE
LINE = 16
N_LINES = round(N ** (2 / 3)) // LINE
WIDTH = 1.5
"""Twins of `kSampleLine`, `n_sample_lines` and `kGuessWidth` in csrc/cuda/select_plan.hpp."""

DRAWS = 400
READ_AND_WRITTEN, READ = 10.0, 8.0  # bytes for each parameter of a merge, and of a count


def magnitudes(rng: np.random.Generator, step: float, rows: float) -> np.ndarray:
    """|task vector| of one fine-tune; `rows`: standard deviation of the logarithm of a row's step."""
    base = torch.from_numpy(rng.normal(0.0, 0.02, N).astype(np.float32)).bfloat16().float()
    size = step * np.exp(rows * rng.standard_normal(SIDE)).repeat(SIDE)
    moved = base + torch.from_numpy((size * rng.standard_normal(N)).astype(np.float32))
    return (moved.bfloat16().float() - base).abs().numpy()


def guesses(
    rng: np.random.Generator, keys: np.ndarray, density: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """The tied share, and of every draw whether there is a guess and whether it is right."""
    k = int(density * N)
    threshold = np.partition(keys, N - k)[N - k]
    size = N_LINES * LINE
    starts = np.arange(N_LINES) * (N // N_LINES)
    likely, right = np.zeros(DRAWS, bool), np.zeros(DRAWS, bool)
    distance = WIDTH * (np.sqrt(density * (1 - density) * size) + 1)
    rank = density * size
    for draw in range(DRAWS):
        begin = starts + rng.integers(0, N // N_LINES - LINE, N_LINES)
        sample = keys[(begin[:, None] + np.arange(LINE)).reshape(-1)]
        at = size - int(np.ceil(rank))
        guess = np.partition(sample, at)[at]
        n_greater, n_from = int((sample > guess).sum()), int((sample >= guess).sum())
        likely[draw] = rank - n_greater >= distance and (guess == 0 or n_from - rank >= distance)
        right[draw] = guess == threshold
    return float((keys == threshold).mean()), likely, right


def main() -> None:
    rng = np.random.default_rng(0)
    sample_bytes = 3 * N_LINES * 2 * 64 / N  # two sectors of the base and of a model, for each line
    print(f"{N_LINES} lines of {LINE}; {sample_bytes:.2f} B a parameter for the sample")
    print(" rows    step  density  tied     guessed  of them right  bytes")
    for rows in (0.0, 0.5):
        for step in (3e-3, 1e-3, 3e-4, 1e-4, 3e-5):
            models = [magnitudes(rng, step, rows) for _ in range(3)]
            for density in (0.1, 0.2, 0.5):
                tied, likely, right = zip(*(guesses(rng, keys, density) for keys in models), strict=True)
                tried = np.all(likely, axis=0)
                good = np.all(right, axis=0)[tried]
                n_bytes = READ + READ_AND_WRITTEN + sample_bytes
                if tried.any():
                    with_guess = READ_AND_WRITTEN + (1 - good.mean()) * (READ + READ_AND_WRITTEN)
                    n_bytes += tried.mean() * (with_guess - READ - READ_AND_WRITTEN)
                print(
                    f"{rows:5.1f} {step:7.0e} {density:8.1f} {np.mean(tied):6.1%} {tried.mean():10.0%} "
                    f"{good.mean() if tried.any() else float('nan'):14.0%} {n_bytes:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
