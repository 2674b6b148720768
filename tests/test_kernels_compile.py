"""The CUDA sources compile for every card that is served, and keep their values in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MAX_REGISTERS = 64  # of a thread: 1,024 threads of one multiprocessor stay resident
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", "-cubin", "-Xptxas", "-v", "-Wno-deprecated-gpu-targets")
USAGE = re.compile(
    r"Function properties for (?P<kernel>\w+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers"
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, and there is none on the PATH")


def compiled(source: Path, architecture: str, folder: Path) -> list[dict[str, str]]:
    """What ptxas says of each kernel in a source: its name, registers, stack frame and spilled bytes."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    command = [nvcc, *FLAGS, f"-arch={architecture}", "-o", str(folder / "kernel.cubin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [found.groupdict() for found in USAGE.finditer(run.stderr)]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.name)
def test_no_kernel_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    kernels = compiled(source, architecture, tmp_path)
    assert kernels, "ptxas reported no kernel"
    for kernel in kernels:
        spilled = {name: int(kernel[name]) for name in ("stack", "stores", "loads")}
        assert spilled == {"stack": 0, "stores": 0, "loads": 0}, kernel
        assert int(kernel["registers"]) <= MAX_REGISTERS, kernel


@needs_nvcc
def test_a_kernel_that_spills_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text("""
__global__ void __launch_bounds__(1024, 2) spills(const float* in, float* out, int n) {
  float kept[96];
  for (int i = 0; i < 96; ++i) kept[i] = in[i * n + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; ++i) out[(i * n) ^ threadIdx.x] = kept[i] * kept[95 - i];
}
""")
    (kernel,) = compiled(source, "sm_90", tmp_path)
    assert "spills" in kernel["kernel"]
    assert int(kernel["stores"]) + int(kernel["stack"]) > 0
