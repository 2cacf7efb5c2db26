"""The `tvfast` command: what it prints, where errors go, and its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tvfast
from tvfast import errors
from tvfast.cli.main import main
from tvfast.errors import BackendError
from tvfast.ops.raw import backend_statuses

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tvfast", *arguments], capture_output=True, text=True, check=False
    )


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tvfast {tvfast.__version__}\n", "")


def test_help_names_every_command_and_starts_no_framework() -> None:
    code = (
        "import sys\nfrom tvfast.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = ('torch', 'numpy', 'yaml', 'tvfast._C_cpu', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for name in ("merge", "plan", "inspect", "sweep", "collect", "methods", "doctor", "bench", "demo"):
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["merge"], ["merge", "x"], ["plan"], ["inspect"], ["demo", "--seed", "-1"], ["demo", "--seed", "x"]],
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error:" in shown.err


def test_methods_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(tvfast.methods.METHODS)
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found) == sorted(tvfast.methods.METHODS)
    assert found["ties"]["formula"] in "\n".join(lines)


@pytest.mark.parametrize("name", sorted(tvfast.methods.METHODS))
def test_one_method_in_full(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    info = tvfast.methods.METHODS[name]
    assert main(["methods", name]) == 0
    text = capsys.readouterr().out
    for part in (info.formula, info.source, *info.dialects, *(p.meaning for p in info.parameters)):
        assert part in text
    assert main(["methods", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == name
    assert found["source"] == info.source
    assert [p["name"] for p in found["parameters"]] == [p.name for p in info.parameters]


def test_a_method_gives_the_names_that_recipes_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "ties", "--json"]) == 0
    names = {p["name"]: p["in_recipe"] for p in json.loads(capsys.readouterr().out)["parameters"]}
    assert (names["weights"], names["scale"], names["seed"]) == ("weight", "lambda", "tvfast.seed")
    assert main(["methods", "slerp", "--json"]) == 0
    names = {p["name"]: p["in_recipe"] for p in json.loads(capsys.readouterr().out)["parameters"]}
    assert (names["t"], names["scale"]) == ("t", None)


def test_an_unknown_method_is_one_message_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "tise"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tvfast: error: ")
    assert "did you mean 'ties'" in shown.err
    assert shown.err.count("\n") == 1


def test_a_terminal_of_another_encoding_gets_what_it_can_show() -> None:
    for arguments in (["methods"], ["merge", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "tvfast", *arguments],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "?" in done.stdout


def test_doctor_gives_every_backend_and_the_reason_for_each_no(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVFAST_BACKEND", "reference")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tvfast"] == tvfast.__version__
    assert found["variables"]["TVFAST_BACKEND"] == "reference"
    names = [status.name for status in backend_statuses()]
    assert [one["name"] for one in found["backends"]] == names
    assert all(one["detail"] for one in found["backends"])
    usable = {one["name"]: one["usable"] for one in found["backends"]}
    assert usable["reference"]
    assert usable["cuda"] <= torch.cuda.is_available()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for one in found["backends"]:
        assert one["detail"] in text
    assert "TVFAST_BACKEND=reference" in text


def test_a_failed_job_is_one_message_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise BackendError("no backend can run the call.")

    monkeypatch.setattr("tvfast.cli.doctor.diagnosis", fail)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "tvfast: error: no backend can run the call.\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.RecipeError("x"), 2),
        (errors.UnknownNameError("x"), 2),
        (errors.ArgumentError("x"), 2),
        (errors.ShapeError("x"), 1),
        (errors.StateDictError("x"), 1),
        (errors.DTypeError("x"), 1),
        (errors.CheckpointError("x"), 1),
        (errors.MergeError("x"), 1),
        (errors.OutputError("x"), 1),
        (errors.BackendError("x"), 1),
        (ImportError("x"), 1),
        (OSError(28, "x"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_status_tells_configuration_from_failure(
    error: BaseException,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("tvfast.cli.doctor.diagnosis", fail)
    assert main(["doctor"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tvfast: error: ")
    assert shown.err.count("\n") == 1


def test_a_defect_is_one_line_and_the_traceback_only_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("no\nsuch key")

    monkeypatch.setattr("tvfast.cli.doctor.diagnosis", fail)
    monkeypatch.delenv("TVFAST_DEBUG", raising=False)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tvfast: error: internal error in test_cli.py, line ")
    assert "KeyError" in shown.err
    assert "TVFAST_DEBUG=1" in shown.err
    assert shown.err.count("\n") == 1
    monkeypatch.setenv("TVFAST_DEBUG", "1")
    assert main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tvfast.cli.demo._NEEDS", {"no_such_module": "no-such-package"})
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "needs no-such-package" in shown
    assert "pip install 'tvfast[demo]'" in shown
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_ends_quietly() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'tvfast', 'methods', '--json'],"
        " stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "child.stdout.close()\n"
        "sys.stdout.write(child.stderr.read().decode())\n"
        "child.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_examples_of_the_readme_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert {"report", "new", "merged", "signs", "value"} <= set(names)


def test_the_readme_lists_the_methods_and_their_parameters() -> None:
    listed = {}
    for line in README.splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `"):
            listed.update({name: set(cells[2]) if len(cells) > 2 else set() for name in cells[0]})
    shared = {"weights", "scale", "seed", "tie", "dialect"}
    assert listed == {
        name: {p.name for p in info.parameters} - shared for name, info in tvfast.methods.METHODS.items()
    }
