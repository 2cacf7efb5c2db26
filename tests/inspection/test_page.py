"""Pages without a browser: one file, no reference to a network, the data of `--json`, names as text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.families import Family, make_family, recipe
from tvfast.cli.main import main
from tvfast.inspection.page import page

EVIL = "model.layers.0.</script><script>alert(1)</script><!--&{{STYLE}}.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("pages"))


class Outline(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def checked(text: str) -> Outline:
    """The page's outline; it must stand alone."""
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text, re.IGNORECASE)
    assert "{{" not in text.replace("{{STYLE}}", "")
    outline = Outline(text)
    assert [tag for tag, _ in outline.tags].count("script") == 2
    for tag, attributes in outline.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#") or (tag, attributes["href"]) == ("link", "data:,")
    policy = next(a["content"] for _, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    return outline


def test_the_page_holds_what_json_prints(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(family.path(name)) for name in ("base", "ft1", "ft2", "ft3")]
    file = tmp_path / "page.html"
    assert main(["inspect", *paths, "--json", "--html", str(file)]) == 0
    outline = checked(file.read_text(encoding="utf-8"))
    assert outline.data == json.loads(capsys.readouterr().out)
    again = tmp_path / "again.html"
    assert main(["inspect", *paths, "--html", str(again)]) == 0
    assert f"Written: {again}" in capsys.readouterr().out
    assert again.read_bytes() == file.read_bytes()


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    for name in "ab":
        save_file({EVIL: torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    file = tmp_path / "page.html"
    assert (
        main(["inspect", *(str(tmp_path / f"{name}.safetensors") for name in "ab"), "--html", str(file)]) == 0
    )
    outline = checked(file.read_text(encoding="utf-8"))
    assert list(outline.data["task_vectors"]["tensors"]) == [EVIL]


def test_scripts_make_no_markup_of_text() -> None:
    text = page("inspect", {}) + page("merge", {})
    for maker in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert maker not in text


def test_a_page_needs_models(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(family.path("base")), "--html", str(tmp_path / "x.html")]) == 2
    assert "--html shows how models differ from their base" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_place_that_cannot_be_written_is_refused_before_reading(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    paths = [str(family.path("base")), str(tmp_path / "not even there")]
    assert main(["inspect", *paths, option, str(tmp_path / "no" / "x.html")]) == 1
    assert f"there is no directory {tmp_path / 'no'}" in capsys.readouterr().err
    assert main(["inspect", *paths, option, str(tmp_path)]) == 1
    assert "is a directory; expected the name of a file" in capsys.readouterr().err


def test_a_picture(family: Family, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "picture.png"
    assert main(["inspect", *(str(family.path(n)) for n in ("base", "ft1", "ft2")), "--png", str(file)]) == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert len(data) > 20_000


def test_the_report_of_a_merge_is_a_page(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "recipe.yml"
    config.write_text(recipe(family, "ties", parameters={"density": 0.3}))
    folder = tmp_path / "report"
    assert main(["merge", str(config), str(tmp_path / "out"), "--json", "--report", str(folder)]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert {file.name for file in folder.iterdir()} == {"report.html", "report.json", "tensors.json"}
    outline = checked((folder / "report.html").read_text(encoding="utf-8"))
    assert outline.data == json.loads((folder / "tensors.json").read_text())
    assert outline.data["outcome"] == outcome
    assert outline.data["recipe"] == config.read_text()
    assert outline.data["models"] == [str(family.path(name)) for name in ("ft1", "ft2", "ft3")]


def test_a_dry_run_has_no_page(family: Family, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yml"
    config.write_text(recipe(family, "ties", parameters={"density": 0.3}))
    folder = tmp_path / "report"
    assert main(["merge", str(config), str(tmp_path / "out"), "--dry-run", "--report", str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == {"report.json"}


def test_a_page_needs_no_framework(family: Family, tmp_path: Path) -> None:
    paths = [str(family.path("base")), str(family.path("ft1"))]
    code = (
        "import sys\nfrom tvfast.cli.main import main\n"
        f"main(['inspect', *{paths!r}, '--html', {str(tmp_path / 'x.html')!r}])\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
