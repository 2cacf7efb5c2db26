#!/usr/bin/env bash
# Build for the GPU at hand, test on it, time rows, look for memory errors and races: one call under 9 minutes.
#
#   bench/gpu_check.sh             needs a GPU, nvcc, and in $PYTHON torch, Triton, pybind11, cmake, ninja, pytest
#   bench/gpu_check.sh --dry-run   the same stages on the backends' stand-ins, at tiny sizes: no figures
#
# Every stage has a limit of its own and of what is left of GPU_CHECK_SECONDS (530). One that fails or runs out
# is reported, and the later ones still run. The exit status is 0 if none failed.
# Into OUT (bench/results) go gpu-<device>-<time>-<commit>.json and a log of the same name.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
DEADLINE=${GPU_CHECK_SECONDS:-530}
SKIPPED=77
DRY=
case ${1:-} in
  '') ;;
  --dry-run) DRY=1 ;;
  *) echo "gpu_check.sh: unknown argument '$1'; expected nothing, or --dry-run" >&2; exit 2 ;;
esac

unset TVFAST_BACKEND TVFAST_SIMT TRITON_INTERPRET TVFAST_REQUIRE
export TVFAST_COMMIT=${TVFAST_COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
export PYTHONUNBUFFERED=1
if [[ $DRY ]]; then
  export TVFAST_SIMT=1 TRITON_INTERPRET=1
  DEVICE=cpu NAME=dry-run SMALL=128 LARGE=192
else
  TVFAST_DRIVER=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
  export TVFAST_DRIVER
  NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z-')
  DEVICE=cuda NAME=${NAME:-no-gpu} SMALL=100000000 LARGE=1000000000
fi
mkdir -p "$OUT"
STEM=$OUT/gpu-${NAME//[^a-z0-9-]/}-$(date -u +%Y%m%dT%H%M%S)-${TVFAST_COMMIT:0:12}
RESULT=$STEM.json LOG=$STEM.log
FAILED=0
TABLE=()

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 begin=$SECONDS status part result
  shift 2
  if ((DEADLINE - SECONDS < limit)); then limit=$((DEADLINE - SECONDS)); fi
  if ((limit <= 0)); then
    FAILED=1
    TABLE+=("$(printf '%-16s %-22s' "$name" 'no time left')")
    return
  fi
  echo "== $name, at most $limit s"
  part=$(mktemp)
  timeout --kill-after=5 "$limit" "$@" >"$part" 2>&1
  status=$?
  { echo "== $name"; cat "$part"; } >>"$LOG"
  case $status in
    0) result=passed ;;
    "$SKIPPED") result=skipped ;;
    124 | 137) result='out of time' FAILED=1 ;;
    *) result="FAILED, status $status" FAILED=1 ;;
  esac
  tail -n "$([[ $result == passed ]] && echo 3 || echo 30)" "$part"
  rm -f "$part"
  TABLE+=("$(printf '%-16s %-22s %4d s' "$name" "$result" $((SECONDS - begin)))")
}

build() {
  if [[ $DRY ]]; then
    "$PYTHON" -c 'import tvfast._C_cpu, tvfast._C_simt'
  else
    # The largest file alone would take longest: its kernels are compiled side by side.
    NVCC_APPEND_FLAGS=--split-compile=0 TVFAST_CUDA=ON "$PYTHON" -m pip --disable-pip-version-check install \
      --no-build-isolation --no-deps -v -e .
  fi
}

tests() {
  local paths=() options=(-q -p no:cacheprovider -o filterwarnings=default) path
  for path in tests/cuda tests/kernels tests/devices tests/live tests/engine/test_device.py; do
    if [[ -e $path ]]; then paths+=("$path"); fi
  done
  if [[ $DRY ]]; then
    options+=(--collect-only)
  else
    export TVFAST_REQUIRE=cuda,triton
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then options+=(-n 8); fi
  fi
  "$PYTHON" -m pytest "${options[@]}" "${paths[@]}"
}

rows() {
  "$PYTHON" -m bench.gpu "$RESULT" --device "$DEVICE" --group "$@"
}

# Torch would hand out parts of larger allocations, whose ends the tool does not see.
sanitized() {
  local tool=(compute-sanitizer --tool "$1" --error-exitcode 1)
  # What a call returned is checked by its caller; torch asks about pointers that are none of the device's.
  if [[ $1 == memcheck ]]; then tool+=(--report-api-errors no); fi
  if [[ $DRY ]]; then
    tool=()
  elif ! command -v compute-sanitizer >/dev/null; then
    echo 'compute-sanitizer is not on PATH'
    return $SKIPPED
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" "$PYTHON" -m bench.gpu.small "$DEVICE"
}

# timeout starts programs, not functions, so each stage is this script's functions in a shell of its own.
export PYTHON DEVICE RESULT DRY SKIPPED
export -f build tests rows sanitized

stage build 200 bash -c build
stage tests 130 bash -c tests
stage merges-1e8 130 bash -c "rows merges --elements $SMALL"
stage merges-1e9 110 bash -c "rows merges --elements $LARGE"
stage layers 50 bash -c 'rows layers'
stage table 60 bash -c 'rows table'
stage live 25 bash -c 'rows live'
stage memcheck 60 bash -c 'sanitized memcheck'
stage racecheck 60 bash -c 'sanitized racecheck'
stage checkpoints 90 bash -c 'rows checkpoints'

echo
if [[ -e $RESULT ]]; then "$PYTHON" -m bench.gpu "$RESULT" --show | tee -a "$LOG"; fi
echo
printf '%s\n' "${TABLE[@]}" | tee -a "$LOG"
echo "$RESULT"
exit $FAILED
