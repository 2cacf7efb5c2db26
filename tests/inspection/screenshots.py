"""The pictures of docs/inspecting.md, by Chromium and Pillow: python -m tests.inspection.screenshots DIR."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.inspection.chromium import browser
from tests.inspection.family_70b import MODELS, write_family
from tvfast.cli.main import main

RECIPE = """merge_method: ties
base_model: base
models:
- {model: chat, parameters: {weight: 1.0, density: 0.3}}
- {model: code, parameters: {weight: 1.0, density: 0.3}}
- {model: math, parameters: {weight: 0.6, density: 0.3}}
dtype: bfloat16
"""


def take(folder: Path) -> None:
    """Desktop in light, phone in dark, and the report of a merge."""
    with tempfile.TemporaryDirectory() as name, browser() as window:
        root = Path(name)
        write_family(root)
        os.chdir(root)
        (root / "ties.yml").write_text(RECIPE)
        main(["inspect", "base", *MODELS, "--html", "inspect.html"])
        main(["merge", "ties.yml", "out", "--report", "report"])
        window.open(root / "inspect.html", width=1440, height=900)
        window.picture(folder / "inspecting-desktop.png", clip=(96, 0, 1248, 1760))
        window.open(root / "inspect.html", width=390, height=844, dark=True, scale=1.5)
        window.picture(folder / "inspecting-phone.png", clip=(0, 0, 390, 1900))
        window.open(root / "report" / "report.html", width=1440, height=900)
        window.picture(folder / "inspecting-merge.png", clip=(96, 0, 1248, 1400))
    for file in folder.glob("inspecting-*.png"):
        Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)
        print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    take(Path(sys.argv[1]).resolve())
