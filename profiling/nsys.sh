#!/usr/bin/env bash
# Captures steady training steps with Nsight Systems, with the NVTX ranges data, forward, backward and optimizer.
#
#   profiling/nsys.sh OUT [arguments of profiling.trace]        e.g. profiling/nsys.sh runs/nsys --config gpu_optimized.json
#
# leaves OUT/steps.nsys-rep (open it in nsys-ui) and OUT/*.csv: time on the host and on the GPU by NVTX range, kernels
# by NVTX range, kernels, memory copies, launches and other calls of CUDA. The ranges lie in the domain "eventkern".
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
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
rm -f "$out/steps.nsys-rep"
nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \
  --output="$out/steps" python -m profiling.trace --nvtx "$@"
if [ ! -f "$out/steps.nsys-rep" ]; then
  echo "nsys captured nothing: the capture begins at cudaProfilerStart, which only a run on a CUDA device calls." >&2
  echo "On a CPU, 'python -m profiling.trace' has the same ranges." >&2
  exit 4
fi
nsys stats --force-export=true --format=csv --output="$out/steps" \
  --report=nvtx_sum,nvtx_gpu_proj_sum,nvtx_kern_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum,cuda_api_sum \
  "$out/steps.nsys-rep"
