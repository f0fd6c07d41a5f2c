#!/usr/bin/env bash
# On a machine with a GPU: build, run every test that needs one, then the benchmarks; all reports go to $OUT.
#
#   OUT=folder bash benchmarks/gpu_check.sh
#
# Uses the Python on the PATH and what it has: nothing is downloaded. LPMFLOW_CUDA_ARCHS is set to the GPU's own
# architecture unless it is set already.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:?OUT must name a folder for the reports}
mkdir -p "$out"
python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device here: nothing to check")' || exit 1
: "${LPMFLOW_CUDA_ARCHS:=$(python -c 'import torch; c = torch.cuda.get_device_capability(); print("90a" if c == (9, 0) else f"{c[0]}{c[1]}")')}"
export LPMFLOW_CUDA_ARCHS LPMFLOW_CUDA=1
failed=0
step() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    echo "$name exit $status" >>"$out/summary.txt"
    [ "$status" -eq 0 ] || failed=1
}
step build python setup.py build_ext --inplace
# The two packages under their installed names, without installing them.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
ln -s "$PWD/lpmflow" "$packages/lpmflow"
ln -s "$PWD/kernels" "$packages/lpmflow_kernels"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
step info python -m lpmflow info
step tests python -m pytest -q -p no:cacheprovider -m gpu --junitxml="$out/tests.xml" tests
step benchmarks python -m pytest -q -p no:cacheprovider benchmarks --json "$out/benchmarks.json"
cat "$out/summary.txt"
exit "$failed"
