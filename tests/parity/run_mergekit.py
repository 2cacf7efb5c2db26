"""Run mergekit-yaml on recipes, one after the other. Runs in the peer's environment (make_env.sh).

    PEER/bin/python run_mergekit.py JOBS.json

JOBS.json is a list of {"recipe": PATH, "out": PATH, "cwd": PATH}: `cd CWD && mergekit-yaml RECIPE OUT`.
Prints one JSON list with seconds and, where a run failed, the error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.scripts.run_yaml import main as mergekit_yaml


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    done = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.chdir(job["cwd"])
        start = time.perf_counter()
        record = {}
        try:
            mergekit_yaml.main([job["recipe"], job["out"], "--quiet"], standalone_mode=False)
        except Exception as error:  # the caller reports it for this recipe and goes on with the others
            record["error"] = f"{type(error).__name__}: {error}"
        done.append(record | {"seconds": time.perf_counter() - start})
    print(json.dumps({"version": version("mergekit"), "torch": torch.__version__, "runs": done}))


if __name__ == "__main__":
    main()
