#!/bin/sh
# Make the environment that runs mergekit for tests/parity: make_env.sh VENV_DIRECTORY [PYTHON]
# torch comes first and pinned, so that nothing later pulls another build of it.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: $0 VENV_DIRECTORY [PYTHON]" >&2
    exit 2
fi
venv=$1
python=${2:-python3}

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0
"$venv/bin/python" -m pip install --quiet mergekit==0.1.5
"$venv/bin/python" -c 'import mergekit.merge_methods.registry'
echo "export TVFAST_MERGEKIT_PYTHON=$venv/bin/python"
