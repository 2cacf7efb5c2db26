"""Pages in headless Chromium: drawn without an error, at phone and desktop width, by keyboard, in time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.families import make_family
from tests.inspection import chromium
from tests.inspection.family_70b import LAYERS, MODELS, write_family
from tests.inspection.test_page import EVIL
from tvfast.cli.main import main

N_TENSORS = 9 * LAYERS + 3


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    if chromium.executable() is None:
        if "chromium" in os.environ.get("TVFAST_REQUIRE", "").split(","):
            pytest.fail("TVFAST_REQUIRE demands chromium, which is missing; apt-get install chromium")
        pytest.skip("there is no Chromium on this machine; apt-get install chromium")
    with chromium.browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(browser: chromium.Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds of page, of a family with the names of a 70B model."""
    root = tmp_path_factory.mktemp("family")
    paths = write_family(root)
    base, *models = (str(path) for path in paths.values())
    assert main(["inspect", base, *models, "--html", str(root / "inspect.html")]) == 0
    listed = "".join(f"- {{model: {model}, parameters: {{weight: 0.5, density: 0.3}}}}\n" for model in models)
    (root / "ties.yml").write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels:\n{listed}dtype: bfloat16\n"
    )
    assert main(["merge", str(root / "ties.yml"), str(root / "out"), "--report", str(root / "report")]) == 0
    return {"inspect": root / "inspect.html", "merge": root / "report" / "report.html"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("kind", ["inspect", "merge"])
def test_a_page_is_drawn(
    browser: chromium.Browser, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    seconds = browser.open(pages[kind], width=width, height=900, dark=dark)
    assert browser.log == []
    assert browser.requested == [pages[kind].as_uri()]
    assert seconds < 2.0
    assert browser.value("document.documentElement.scrollWidth") == width  # nothing sticks out
    n_drawings = browser.value("document.querySelectorAll('.chart > svg').length")
    assert n_drawings == browser.value("document.querySelectorAll('.chart').length") >= 4
    # Texts stay within their drawing, and no two numbers of an axis touch.
    assert browser.value(_OUTSIDE) == []
    assert browser.value(_LOW_CONTRAST) == []
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(", "))) < 200) is dark


def test_every_tensor_is_found_and_sorted_by_keyboard(
    browser: chromium.Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["inspect"], width=1440, height=900)
    rows = "[...document.querySelectorAll('#numbers tbody tr')].map((row) => row.cells[0].textContent)"
    assert len(browser.value(rows)) == 100
    browser.value("document.querySelector('#numbers .more').click()")
    names = browser.value(rows)
    assert len(names) == N_TENSORS
    assert names.index("model.layers.2.mlp.up_proj.weight") < names.index(
        "model.layers.10.mlp.up_proj.weight"
    )
    heads = "[...document.querySelectorAll('#numbers thead button')]"
    browser.value(f"{heads}.find((head) => head.textContent.startsWith('Sign conflict')).focus()")
    column = "[...document.querySelectorAll('#numbers thead th')].findIndex((head) => head.ariaSort)"
    cells = (
        "[...document.querySelectorAll('#numbers tbody tr')]"
        f".map((row) => parseFloat(row.cells[{column}].textContent))"
    )
    for key, order in (("Enter", "descending"), (" ", "ascending")):
        browser.press(key)
        assert browser.value("document.querySelectorAll('#numbers th[aria-sort]').length") == 1
        assert browser.value("document.querySelector('#numbers th[aria-sort]').ariaSort") == order
        values = browser.value(cells)
        assert values == sorted(values, reverse=order == "descending")
    browser.value(
        "var box = document.querySelector('#numbers input[type=search]'); box.value = '31 Q_PROJ';"
        "box.dispatchEvent(new Event('input'))"
    )
    assert browser.value(rows) == ["model.layers.31.self_attn.q_proj.weight"]
    assert (
        browser.value("document.querySelector('#numbers [role=status]').textContent")
        == f"1 of {N_TENSORS} rows"
    )
    browser.value(
        "box.value = '31'; box.dispatchEvent(new Event('input'));"
        "[...document.querySelectorAll('#numbers input[type=radio]')][1].click()"
    )
    assert browser.value(rows) == ["model.layers.31"]


def test_a_drawing_tells_its_numbers(browser: chromium.Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["inspect"], width=1440, height=900)
    browser.value("document.querySelector('#size svg[tabindex]').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    spoken = browser.value("document.getElementById('said').textContent")
    assert spoken.startswith("model.layers.2: ")
    assert all(f"{name} 0." in spoken for name in MODELS)
    browser.value("document.activeElement.blur()")
    assert browser.value("document.getElementById('tip').hidden") is True
    browser.value("document.querySelector('#size svg').scrollIntoView({behavior: 'instant'})")
    browser.frames()
    x, y = browser.value(
        "(() => { const box = document.querySelector('#size svg[tabindex]').getBoundingClientRect();"
        "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
    )
    browser.move(x, y)
    assert browser.value("document.getElementById('tip').hidden") is False
    assert browser.value("document.querySelectorAll('#tip div').length") == len(MODELS)


@pytest.mark.parametrize("members", [("ft1",), ("base",), tuple(f"ft{k % 3 + 1}" for k in range(9))], ids=len)
def test_any_number_of_models_and_none_that_differs(
    browser: chromium.Browser, tmp_path: Path, members: tuple[str, ...]
) -> None:
    family = make_family(tmp_path)
    paths = [str(family.path(name)) for name in ("base", *members)]
    assert main(["inspect", *paths, "--html", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html", width=390, height=800)
    assert browser.log == []
    assert browser.value("document.documentElement.scrollWidth") == 390
    assert browser.value(_OUTSIDE) == []
    assert "NaN" not in browser.value("document.getElementById('main').innerText")


@pytest.mark.parametrize("third", [0.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("n_models", [2, 3])
def test_what_has_no_size_or_direction_is_not_judged(
    browser: chromium.Browser, tmp_path: Path, third: float, n_models: int
) -> None:
    """A model that is the base, or is not finite."""
    import torch
    from safetensors.torch import save_file

    names = [f"layers.{k}.weight" for k in range(2)]
    models = {"base": 1.0, "same": 1.0 + third, "tuned": 1.5, "other": 1.7}
    for model, value in models.items():
        save_file({name: torch.full((4, 4), value) for name in names}, tmp_path / f"{model}.safetensors")
    paths = [str(tmp_path / f"{model}.safetensors") for model in [*models][: n_models + 1]]
    assert main(["inspect", *paths, "--html", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html", width=1440, height=900)
    assert browser.log == []
    text = browser.value("document.getElementById('summary').innerText")
    assert ("equals the base and adds nothing" in text) == (third == 0)
    assert ("holds NaN or infinity" in text) == (third != 0)
    assert ("An angle needs two models" in text) == (n_models == 2)
    assert ("Most alike: tuned.safetensors and other.safetensors" in text) == (n_models == 3)
    assert not any(
        word in text for word in ("NaN%", "Opposed", "Balanced", "Lopsided", "More than by chance")
    )
    cells = "[...document.querySelectorAll('#numbers tbody tr:first-child td')].map((cell) => cell.innerText)"
    change = browser.value(cells)[2]
    assert change == ("0\xa0%" if third == 0 else "–")


def test_names_stay_text(browser: chromium.Browser, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name in "ab":
        save_file({EVIL: torch.full((2, 2), float(name == "b"))}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["inspect", *paths, "--html", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html", width=1440, height=900)
    assert browser.log == []
    assert browser.value("document.querySelector('#numbers tbody th').textContent") == EVIL
    assert browser.value("document.scripts.length") == 2


_OUTSIDE = """[...document.querySelectorAll('.chart > svg')].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 12 || own.right > box.right + 12;
  }).map((text) => text.textContent);
})"""

# Texts against the background behind them, as WCAG 2 computes it; 4.5 is its level AA.
_LOW_CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (; node; node = node.parentElement) {
    const found = rgb(getComputedStyle(node).backgroundColor); if (found[3] === 255) return found; } };
  const low = [];
  const seen = new Set();
  for (const node of document.querySelectorAll('body *:not(script)')) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text || !node.getClientRects().length || node.closest('.skip, .unseen')) continue;
    const style = getComputedStyle(node);
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const key = `${ink} ${getComputedStyle(node.parentElement).backgroundColor} ${style.backgroundColor}`;
    if (seen.has(key)) continue;
    seen.add(key);
    const [a, b] = [light(rgb(ink)), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${node.tagName} ${node.textContent.slice(0, 40)} ${ink}`);
  }
  return low;
})()"""
