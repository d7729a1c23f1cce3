#!/usr/bin/env bash
# The small GPU tests under NVIDIA's compute-sanitizer (of the CUDA toolkit): memory, races within a
# block, barriers, uninitialised reads. Stops at the first tool that finds something.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: install the CUDA toolkit" >&2; exit 2; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:kernels
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    python3 -m pytest -q -m gpu tests/gpu -k "sanitizer or small"
done
