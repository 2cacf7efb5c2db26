#!/bin/sh
# Make the environment that runs FusionBench for tests/parity: make_fusion_bench_env.sh VENV_DIRECTORY [PYTHON]
# Only its TIES file is run, which needs torch; the package's other requirements are left out.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 VENV_DIRECTORY [PYTHON]" >&2
    exit 2
fi
venv=$1
python=${2:-python3}

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$venv/bin/python" -m pip install --quiet --no-deps fusion_bench==0.2.33
echo "export TVFAST_FUSION_BENCH_PYTHON=$venv/bin/python"
