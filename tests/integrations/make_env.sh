#!/bin/sh
# Make the environment of one peer for tests/integrations: make_env.sh VENV_DIRECTORY REQUIREMENT [PYTHON]
# REQUIREMENT is, for example, peft==0.21.2. torch comes first and pinned, so that nothing later pulls another build.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 VENV_DIRECTORY REQUIREMENT [PYTHON]" >&2
    exit 2
fi
venv=$1
python=${3:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.13.0
"$venv/bin/python" -m pip install --quiet "$2" pytest parameterized datasets diffusers
# This checkout's tvfast, built in place.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo "$root" > "$site/tvfast.pth"
"$venv/bin/python" -c 'import tvfast.integrations'
