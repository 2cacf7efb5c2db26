"""Installing, uninstalling, counting, on a peer that is made for the purpose."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tvfast
from tvfast.errors import PeerError, UnknownNameError
from tvfast.integrations import _patching
from tvfast.integrations._patching import Hook, Integration, NotServed, same

MERGES = """
def merge(x):
    return ("peer", x)

class Task:
    def run(self, x):
        return ("peer", x)
"""
SOURCES = {
    "__init__.py": "",
    "merges.py": MERGES,
    "early.py": "from pretended.merges import merge\n",
    "late.py": "from pretended.merges import merge\n",
}


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "pretended"
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_patching, "version", lambda _: "1.0")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "pretended"]:
        del sys.modules[name]


def ours(x: int) -> Any:
    if x < 0:
        raise NotServed("negative")
    return ("ours", x)


def integration(attribute: str = "merge") -> Integration:
    hooks = [
        Hook("merge", "pretended.merges", attribute, same(ours)),
        Hook("run", "pretended.merges", "Task.run", lambda original: lambda me, x: ("ours", x)),
    ]
    return Integration("pretended", "pretended", ("0.9", "1.0"), lambda version: hooks)


def module(name: str) -> ModuleType:
    return importlib.import_module(f"pretended.{name}")


@pytest.mark.usefixtures("peer")
def test_every_binding_is_replaced_and_given_back() -> None:
    original = module("early").merge
    one = integration()
    one.install()
    assert module("early").merge(1) == module("merges").merge(1) == ("ours", 1)
    assert module("late").merge(2) == ("ours", 2)  # imported while installed
    assert module("merges").Task().run(3) == ("ours", 3)
    kept = module("late").merge
    one.uninstall()
    assert module("early").merge is module("merges").merge is module("late").merge is original
    assert module("merges").Task().run(3) == ("peer", 3)
    assert kept(4) == ("peer", 4)  # whoever kept ours gets the peer's
    assert one.stats() == {"merge": 3, "run": 1}
    one.uninstall()


@pytest.mark.usefixtures("peer")
def test_what_is_not_served_goes_to_the_peer_and_is_counted() -> None:
    with integration() as one:
        merge = module("merges").merge
        assert merge(-1) == ("peer", -1)
        assert merge(1) == ("ours", 1)
        assert one.stats() == {"merge": 1}
        assert one.fallbacks() == {"merge": {"negative": 1}}
    assert not one.installed
    one.install()
    assert one.stats() == {} == one.fallbacks()
    one.install(rng="peer")
    assert one.rng == "peer"
    one.uninstall()


@pytest.mark.usefixtures("peer")
def test_an_error_of_the_peer_shows_nothing_of_ours() -> None:
    with integration(), pytest.raises(TypeError) as caught:
        module("merges").merge()
    assert caught.value.__context__ is None


@pytest.mark.usefixtures("peer")
def test_an_incomplete_peer_is_left_as_it_was() -> None:
    one = integration()
    broken = Integration(
        "pretended",
        "pretended",
        ("1.0",),
        lambda version: [*one.hooks(version), Hook("gone", "pretended.merges", "gone", same(ours))],
    )
    with pytest.raises(PeerError, match=r"pretended 1\.0 cannot be accelerated.*'gone'"):
        broken.install()
    assert module("merges").merge(1) == ("peer", 1)


def test_a_missing_peer_is_named() -> None:
    one = Integration("no-such-peer", "no_such_peer", ("1.0", "2.0"), lambda version: [])
    with pytest.raises(PeerError, match=r"no-such-peer is not installed; expected version 1\.0 or 2\.0"):
        one.install()


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patching, "version", lambda _: "3.0")
    with pytest.raises(PeerError, match=r"pretended 3\.0 is installed; expected version 0\.9 or 1\.0"):
        integration().install()


def test_an_unknown_generator_is_named() -> None:
    with pytest.raises(UnknownNameError, match="rng 'torch' does not exist; expected one of tvfast, peer"):
        integration().install(rng="torch")


@pytest.mark.parametrize("name", ["peft", "mergekit", "fusion_bench", "sd_mecha"])
def test_every_integration_has_the_same_face(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(tvfast.integrations, name)
    assert found.stats() == {} == found.fallbacks()
    found.uninstall()
    monkeypatch.setattr(_patching, "version", lambda _: "0.0.1")
    with pytest.raises(PeerError, match="expected version"), found:
        pass
    with pytest.raises(PeerError, match="expected version"):
        found.install(rng="peer")


def test_importing_them_imports_no_peer() -> None:
    for name in tvfast.integrations.__all__:
        getattr(tvfast.integrations, name)
    assert not {"mergekit", "fusion_bench", "sd_mecha"} & {name.split(".")[0] for name in sys.modules}


@pytest.mark.usefixtures("peer")
def test_a_call_that_is_left_to_the_peer_has_drawn_nothing() -> None:
    def drawing(x: int) -> Any:
        torch.rand(3)
        raise NotServed("not this time")

    one = Integration(
        "pretended", "pretended", ("1.0",), lambda _: [Hook("m", "pretended.merges", "merge", same(drawing))]
    )
    with one.install():
        before = torch.get_rng_state()
        assert module("merges").merge(1) == ("peer", 1)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("peer")
def test_the_end_of_a_block_brings_back_what_was_around_it() -> None:
    one, original = integration(), module("merges").merge
    with one.install(rng="peer"):
        one.options["engine"] = True
        with one.install():
            assert one.rng == "tvfast"
            one.options["engine"] = False
            with one:
                pass
            assert one.installed
        assert one.installed
        assert (one.rng, one.options) == ("peer", {"engine": True})
        with one:
            pass
        assert (one.installed, one.rng) == (True, "peer")
    assert not one.installed
    assert module("merges").merge is original
    assert not one.options
    with one:
        assert one.rng == "tvfast"
    assert not one.installed
    with one.install():
        one.uninstall()
        assert not one.installed
    assert not one.installed


@pytest.mark.usefixtures("peer")
def test_many_threads_install_once() -> None:
    one, original = integration(), module("merges").merge
    for _ in range(20):
        barrier = threading.Barrier(8)

        def work(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            one.install()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(one._patches) == 2
        one.uninstall()
        assert module("merges").merge is original
