"""Rows on a GPU: `python -m bench.gpu --help`; `bench/gpu_check.sh` runs all of them after the GPU tests."""
