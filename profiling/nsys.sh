#!/usr/bin/env bash
# Captures steady training steps with Nsight Systems, with the NVTX ranges data, forward, backward and optimizer.
#
#   profiling/nsys.sh OUT [arguments of profiling.trace]        e.g. profiling/nsys.sh runs/nsys --config gpu_optimized.json
#
# leaves OUT/steps.nsys-rep (open it in nsys-ui) and OUT/*.csv (time by NVTX range, by kernel, by memory copy).
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
shift

if ! command -v nsys >/dev/null; then
  echo "nsys is not on the PATH. Install Nsight Systems: 'apt install nsight-systems-cli' from NVIDIA's repository" >&2
  echo "(https://developer.nvidia.com/nsight-systems), or add the CUDA toolkit's bin folder to the PATH." >&2
  exit 3
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \
  --output="$out/steps" python -m profiling.trace --nvtx "$@"
nsys stats --force-export=true --format=csv --output="$out/steps" \
  --report=nvtx_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum "$out/steps.nsys-rep"
