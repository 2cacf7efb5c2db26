"""Random damage to headers and PyTorch files: what is taken is what it says, all else is a named error."""

from __future__ import annotations

import io
import os
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
import safetensors
import torch

from tests.corpus.mutations import mutated
from tvfast.checkpoint.header import parse_header
from tvfast.checkpoint.pytorch import read_pytorch
from tvfast.dtypes import n_bytes
from tvfast.errors import CheckpointError

_TRACED = 250  # one input in so many is traced


@dataclass
class Outcome:
    """What a run over many inputs found."""

    n_inputs: int = 0
    n_accepted: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    most_memory: int = 0  # beyond 10 times the input


def check_header(raw: bytes) -> bool:
    """Whether `raw` is taken; if so, it must be what the header says, and the reference must take it too."""
    try:
        header = parse_header(raw, len(raw), "x")
    except CheckpointError as error:
        message = str(error)
        assert message.startswith("x: "), raw
        assert len(message) < 1200, raw
        assert message.isprintable(), raw
        return False
    position = header.data_start
    for tensor in header.tensors:
        n_elements = 1
        for size in tensor.shape:
            n_elements *= size
        assert tensor.offset == position, raw
        assert tensor.n_bytes == n_bytes(tensor.dtype, n_elements), raw
        position += tensor.n_bytes
    assert position == len(raw), raw
    reference = dict(safetensors.deserialize(raw))
    assert {t.name: (t.dtype, list(t.shape)) for t in header.tensors} == {
        name: (found["dtype"], found["shape"]) for name, found in reference.items()
    }, raw
    return True


def fuzz_headers(n_inputs: int, seed: int) -> Outcome:
    random = Random(seed)
    outcome = Outcome(n_inputs)
    for k in range(n_inputs):
        raw = mutated(random)
        if k % _TRACED == 0:
            tracemalloc.start()
            check_header(raw)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            outcome.most_memory = max(outcome.most_memory, peak - 10 * len(raw))
            continue
        started = time.process_time()
        outcome.n_accepted += check_header(raw)
        spent = time.process_time() - started
        outcome.seconds += spent
        outcome.longest = max(outcome.longest, spent)
    return outcome


def check(outcome: Outcome) -> None:
    assert outcome.n_accepted > outcome.n_inputs // 100, "the damage is too heavy to test what is taken"
    assert outcome.n_accepted < outcome.n_inputs // 2, "the damage is too light"
    assert outcome.most_memory < 2**18
    assert outcome.longest < 1


def test_damaged_headers() -> None:
    check(fuzz_headers(10_000, seed=0))


@pytest.mark.slow
def test_a_million_damaged_headers() -> None:
    outcome = fuzz_headers(1_000_000, seed=1)
    print(outcome)
    check(outcome)


def test_random_bytes() -> None:
    random = Random(2)
    for _ in range(2000):
        raw = random.randbytes(random.randrange(64))
        check_header(raw)
        check_header(len(raw).to_bytes(8, "little") + raw)
        check_header((len(raw) + 1).to_bytes(8, "little") + b"{" + raw)


@pytest.fixture
def descriptor() -> Iterator[int]:
    """A file in memory, for writing thousands to a disk takes most of the time."""
    found = os.memfd_create("damaged")
    yield found
    os.close(found)


@pytest.mark.parametrize("protocol", [2, 5])
def test_damaged_pytorch_files(descriptor: int, protocol: int) -> None:
    """Half of the damage is done to the pickle, whose members' sizes then still fit."""
    tensors = {"a": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1)}
    tensors["tied"] = tensors["a"]
    buffer = io.BytesIO()
    torch.save(tensors, buffer, pickle_protocol=protocol)
    valid = buffer.getvalue()
    start = valid.index(b"\x80" + bytes([protocol]))
    end = valid.index(b"PK", start)
    path = f"/proc/self/fd/{descriptor}"
    random = Random(protocol)
    n_accepted = 0
    for k in range(2000):
        raw = bytearray(valid)
        for _ in range(random.choice((1, 1, 2, 3))):
            place = random.randrange(start, end) if k % 2 else random.randrange(len(raw))
            raw[place] = random.choice((random.randrange(256), raw[random.randrange(len(raw))]))
        if k % 5 == 0:
            del raw[random.randrange(len(raw)) :]
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, raw, 0)
        started = time.process_time()
        try:
            header = read_pytorch(path)
        except CheckpointError as error:
            message = str(error)
            assert message.startswith(f"{path}: ")
            assert len(message) < 1200
            assert message.isprintable()
        else:
            n_accepted += 1
            assert all(0 <= t.offset <= t.offset + t.n_bytes <= len(raw) for t in header.tensors)
        assert time.process_time() - started < 1
    assert 20 < n_accepted < 1800
