"""`tvfast merge` by several ranks: the same bytes, however many there are and whatever happens to them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.families import Family, digest, recipe, write_checkpoint
from tests.distributed.ranks import STEPS, End, Job, free_port, merged
from tvfast.cli.main import main
from tvfast.errors import ArgumentError

WEIGHTS = {"ft1": {"weight": 1.0}, "ft2": {"weight": 0.5}, "ft3": {"weight": -0.25}}
QUICK = {"TVFAST_RANK_TIMEOUT": "2"}
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.2},
    "sce": {"select_topk": 0.4},
}


def write(folder: Path, family: Family, method: str = "task_arithmetic", **keys: Any) -> Path:
    path = folder / "config.yaml"
    models = {name: {} for name in WEIGHTS} if method == "sce" else WEIGHTS
    found = {"parameters": METHODS.get(method, {}), "out_shard_size": "400KB", **keys}
    path.write_text(recipe(family, method, models=models, **found))
    return path


def alone(folder: Path, config: Path) -> dict[str, str]:
    assert main(["merge", str(config), str(folder / "alone")]) == 0
    return digest(folder / "alone")


def assert_is_no_model(out: Path) -> None:
    assert not [path for path in out.glob("*") if path.name != ".tvfast"] if out.exists() else True


# -- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "n_ranks"), [("task_arithmetic", 3), ("ties", 2), ("della", 3)])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(
    method: str, n_ranks: int, family: Family, tmp_path: Path
) -> None:
    config = write(tmp_path, family, method)
    job = merged(tmp_path / "logs", ["merge", config, tmp_path / "out", "--json"], n_ranks)
    assert digest(tmp_path / "out") == alone(tmp_path, config)
    report = json.loads(job.ranks[0].output)
    n_bytes = sum(t.numel() * t.element_size() for t in family.base.values())
    assert report["read_bytes"] == sum(one["read_bytes"] for one in report["ranks"]) == 4 * n_bytes
    assert report["written_bytes"] == n_bytes
    for one in report["ranks"]:  # what is measured is counted where the system reads and writes
        assert one["read_bytes"] <= 1.05 * report["read_bytes"] / n_ranks
        assert one["written_bytes"] <= 1.05 * report["written_bytes"] / n_ranks
    assert [rank.output for rank in job.ranks[1:]] == [""] * (n_ranks - 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_every_method_by_every_number_of_ranks(
    method: str, n_ranks: int, family: Family, tmp_path: Path
) -> None:
    config = write(tmp_path, family, method)
    merged(tmp_path / "logs", ["merge", config, tmp_path / "out"], n_ranks)
    assert digest(tmp_path / "out") == alone(tmp_path, config)


def test_whole_models_and_stages(family: Family, tmp_path: Path) -> None:
    """A model that is ranked as a whole, then a merge of its result."""
    first = {**json.loads(recipe(family, "ties", models=WEIGHTS)), "name": "first"}
    first["parameters"] = {"density": 0.3}
    first["tvfast"] = {"dialect": "paper"}
    second = {
        "merge_method": "linear",
        "models": [
            {"model": "first", "parameters": {"weight": 0.5}},
            {"model": str(family.path("ft1")), "parameters": {"weight": 0.5}},
        ],
        "dtype": "bfloat16",
    }
    config = tmp_path / "config.yaml"
    config.write_text(f"{json.dumps(first)}\n---\n{json.dumps(second)}\n")
    merged(tmp_path / "logs", ["merge", config, tmp_path / "out"], 2)
    assert digest(tmp_path / "out") == alone(tmp_path, config)
    assert not (tmp_path / ".out.stages").exists()


@pytest.mark.slow
def test_torchrun_runs_it(family: Family, tmp_path: Path) -> None:
    config = write(tmp_path, family, "ties")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    done = subprocess.run(
        [*command, "-m", "tvfast", "merge", str(config), str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 2
    assert digest(tmp_path / "out") == alone(tmp_path, config)


# -- ranks that end -------------------------------------------------------------------------------------


def killed_and_resumed(family: Family, folder: Path, n_ranks: int, rank: int, end: End, again: int) -> None:
    config, out = write(folder, family), folder / "out"
    arguments = ["merge", config, out]
    with Job(folder / "first", arguments, n_ranks, QUICK, {rank: end}) as job:
        statuses = job.wait(40, beside=rank)
        others = [r for r in range(n_ranks) if r != rank]
        assert all(statuses[r] == 1 for r in others), (statuses, [found.output for found in job.ranks])
        for r in others:
            said = job.ranks[r].output
            assert f"rank {rank} on " in said or (rank == 0 and "store of the job" in said), said
            assert "--resume" in said
    assert_is_no_model(out)
    if again == 1:
        assert main(["merge", str(config), str(out), "--resume"]) == 0
    else:
        merged(folder / "again", [*arguments, "--resume"], again)
    assert digest(out) == alone(folder, config)


@pytest.mark.parametrize(
    ("n_ranks", "rank", "end", "again"),
    [
        (3, 1, End("done", 3), 2),
        (2, 0, End("commit"), 3),
        (2, 1, End("write", 2, signal.SIGSTOP), 1),
    ],
    ids=["killed", "rank-0-killed", "stopped"],
)
def test_a_lost_rank_ends_the_job_and_resume_completes_it(
    n_ranks: int, rank: int, end: End, again: int, family: Family, tmp_path: Path
) -> None:
    killed_and_resumed(family, tmp_path, n_ranks, rank, end, again)


def _points() -> list[tuple[int, int, End, int]]:
    drawn = random.Random(8)
    found = []
    for _ in range(10):
        n_ranks = drawn.randint(2, 4)
        step = drawn.choice([step for step in STEPS if step != "move"])
        rank = 0 if step in ("open", "adopt", "commit") else drawn.randrange(n_ranks)
        n = drawn.randrange(6) if step in ("write", "done") else 0
        found.append((n_ranks, rank, End(step, n), drawn.randint(1, 4)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("n_ranks", "rank", "end", "again"), _points())
def test_a_rank_killed_anywhere(
    n_ranks: int, rank: int, end: End, again: int, family: Family, tmp_path: Path
) -> None:
    killed_and_resumed(family, tmp_path, n_ranks, rank, end, again)


@pytest.mark.slow
def test_rank_0_killed_between_renames(family: Family, tmp_path: Path) -> None:
    config, out = write(tmp_path, family), tmp_path / "out"
    with Job(tmp_path / "first", ["merge", config, out], 2, QUICK, {0: End("move", 2)}) as job:
        assert job.wait(40)[1] == 1
    assert not (out / "model.safetensors.index.json").exists()
    merged(tmp_path / "again", ["merge", config, out, "--resume"], 3)
    assert digest(out) == alone(tmp_path, config)


@pytest.mark.slow
def test_a_stopped_store_ends_the_job(family: Family, tmp_path: Path) -> None:
    """Rank 0 has the store where there is no agent; questions to a stopped process are never answered."""
    end = End("done", 1, signal.SIGSTOP)
    arguments = ["merge", write(tmp_path, family), tmp_path / "out"]
    with Job(tmp_path / "logs", arguments, 2, QUICK, {0: end}) as job:
        assert job.wait(40, beside=0)[1] == 1
        assert "store of the job" in job.ranks[1].output


def test_a_rank_that_never_comes_is_named(family: Family, tmp_path: Path) -> None:
    with Job(tmp_path / "logs", ["merge", write(tmp_path, family), tmp_path / "out"], 3, QUICK) as job:
        job.ranks[2].signal(signal.SIGKILL)
        statuses = job.wait(30)
        assert statuses[:2] == [1, 1]
        assert "rank 2 has not come within 2 s" in job.ranks[0].output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TVFAST_RANK_TIMEOUT", "0"),
        ("TVFAST_RANK_TIMEOUT", "inf"),
        ("TVFAST_STALL_TIMEOUT", "nan"),
        ("RANK", "2"),
        ("MASTER_PORT", "-1"),
    ],
)
def test_a_variable_out_of_its_range_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvfast.distributed import join

    found = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", name: value}
    for variable, text in found.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ArgumentError, match=f"{name} is '?{value}"):
        join()


# -- ranks that disagree --------------------------------------------------------------------------------


def refused(family: Family, folder: Path, others: list[object], *expected: str) -> None:
    """Two ranks, the second with other arguments: both say so."""
    config, out = write(folder, family, "dare_linear"), folder / "out"
    arguments = {0: ["merge", config, out], 1: ["merge", *(others or [config, out])]}
    with Job(folder / "logs", arguments, 2) as job:
        statuses = job.wait(30)
        assert all(status == 1 for status in statuses), [rank.output for rank in job.ranks]
        for rank in job.ranks:
            for text in expected:
                assert text in rank.output, rank.output
    assert not out.exists()


def test_another_seed_recipe_or_option_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    config = write(tmp_path, family, "dare_linear")
    other.write_text(config.read_text().replace("0.6", "0.5"))
    refused(
        family,
        tmp_path,
        [other, tmp_path / "out", "--seed", "5", "--overwrite"],
        "rank 1 on ",
        "the recipe is another one",
        "seed was 0, is 5",
        "overwrite was false, is true",
    )


def test_another_file_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    """The same recipe, on directories that hold other files."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for member in ("base", "ft1", "ft2", "ft3"):
            write_checkpoint(tmp_path / place / member, family.tensors[member])
    path = tmp_path / "b" / "ft2" / "model-00001-of-00002.safetensors"
    os.utime(path, ns=(0, 0))
    text = recipe(Family(Path("."), family.tensors), "linear", base=None, models=WEIGHTS)
    config = tmp_path / "config.yaml"
    config.write_text(text)
    arguments = ["merge", config, tmp_path / "out"]
    with Job(tmp_path / "logs", arguments, 2, folders=[tmp_path / "a", tmp_path / "b"]) as job:
        statuses = job.wait(30)
        for rank in job.ranks:
            assert "ft2/model-00001-of-00002.safetensors: was last changed" in rank.output, rank.output
        assert statuses == [1, 1]


def test_an_error_on_one_rank_is_told_by_all(family: Family, tmp_path: Path) -> None:
    """NaN at the end of the last tensor: one rank meets it."""
    tensors = {name: tensor.clone() for name, tensor in family.tensors["ft2"].items()}
    tensors["lm_head.weight"].view(-1)[-1] = torch.nan
    for member in ("base", "ft1", "ft3"):
        (tmp_path / member).symlink_to(family.path(member))
    write_checkpoint(tmp_path / "ft2", tensors)
    config = write(tmp_path, Family(tmp_path, family.tensors))
    with Job(tmp_path / "logs", ["merge", config, tmp_path / "out"], 2) as job:
        assert job.wait(30) == [1, 1]
        for rank in job.ranks:
            assert "'lm_head.weight' holds NaN" in rank.output
        assert "rank 1 on " in job.ranks[0].output
    assert_is_no_model(tmp_path / "out")
    merged(tmp_path / "again", ["merge", config, tmp_path / "out", "--resume", "--nonfinite", "propagate"], 3)
    assert main(["merge", str(config), str(tmp_path / "alone"), "--nonfinite", "propagate"]) == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "alone")
