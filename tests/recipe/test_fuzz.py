"""Whatever the text, the parser returns a recipe or refuses it by name, quickly and in little memory."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.recipe.mutations import SEEDS, mutated
from tvfast.errors import RecipeError, UnknownNameError
from tvfast.recipe import Recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
N_PROCESSES = 2
MOST_SECONDS = 1.0  # of one short document; the usual one takes 0.3 ms
MOST_BYTES = 2_000_000


def outcome(text: str) -> str:
    """What becomes of a text; any other exception passes through and fails the test."""
    try:
        recipe = parse_recipe(text, "fuzz.yml")
    except (RecipeError, UnknownNameError) as error:
        message = str(error)
        assert message.startswith("fuzz.yml"), message
        assert len(message) < 2000, message
        assert message.isprintable(), message
        return type(error).__name__
    assert isinstance(recipe, Recipe)
    assert recipe.model_paths()
    return "Recipe"


def attempt(seed: int, n: int) -> Counter[str]:
    """Outcomes of `n` mutated recipes; the seed and the number of a failing one are in the error."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for k in range(n):
        text = mutated(rng)
        began = time.process_time()
        try:
            outcomes[outcome(text)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, document {k}: {error!r}\n{text!r}") from error
        assert time.process_time() - began < MOST_SECONDS, f"seed {seed}, document {k}: slow\n{text!r}"
    return outcomes


@pytest.mark.parametrize("text", SEEDS)
def test_seeds_are_recipes(text: str) -> None:
    assert outcome(text) == "Recipe"


def test_mutated_recipes() -> None:
    outcomes = attempt(seed=1, n=3000)
    assert set(outcomes) == {"Recipe", "RecipeError", "UnknownNameError"}
    assert min(outcomes.values()) > 50, outcomes


def test_mutated_recipes_take_little_memory() -> None:
    rng = random.Random(2)
    outcome(SEEDS[0])
    tracemalloc.start()
    try:
        for _ in range(300):
            text = mutated(rng)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            outcome(text)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < MOST_BYTES, text
    finally:
        tracemalloc.stop()


def test_without_libyaml_the_outcome_is_the_same() -> None:
    """PyYAML's own parser words its errors otherwise, but takes and refuses the same texts."""
    code = (
        "import yaml; del yaml.CSafeLoader\n"
        "from tests.recipe.test_fuzz import attempt\n"
        "from tvfast.recipe.document import _Loader\n"
        "assert _Loader.__mro__[1] is yaml.SafeLoader\n"
        "print(sorted(attempt(seed=3, n=300).items()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(attempt(seed=3, n=300).items()))


@pytest.mark.slow
def test_a_million_mutated_recipes() -> None:
    n_jobs = 100
    with ProcessPoolExecutor(N_PROCESSES) as pool:
        jobs = [pool.submit(attempt, 1000 + k, 1_000_000 // n_jobs) for k in range(n_jobs)]
        outcomes = sum((job.result() for job in jobs), Counter())
    assert outcomes.total() == 1_000_000
    print(dict(outcomes))
