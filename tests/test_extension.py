"""The built extension: portable vector code, and no library of torch's or CUDA's that must be there to import it."""

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from eventkern import _C

FOREIGN = re.compile(r"lib(torch|c10|cudart|cuda|cublas|nvrtc)")
# permutation.cpp: eight rounds of two 32-bit products, four vectors side by side, for positions and for walkers.
MULTIPLIES = 8 * 2 * 4 * 2
# multi_embedding.cpp: sums of 2 to 8 vectors forward and 2 to 4 backward, for two types of ids and three of weights.
ADDS = 6 * (2 + 4 + 8 + 2 + 4)

# attention.cpp and attention_backward.cpp, for four head dims: products of 4 keys, one forward and two backward, whose
# loop over the head dim is unrolled up to 8 times, and one sum over keys each way, unrolled up to 16 times.
FUSED = 4 * 3 * (4 + 8 + 8 + 8) + 2 * (4 + 8 + 16 + 16)


def output_of(tool: str, *arguments: str) -> str:
    """What a binutils tool prints of the extension; skips where the tool is missing."""
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}, and there is none on the PATH")
    return subprocess.run([tool, *arguments, _C.__file__], capture_output=True, text=True, check=True).stdout


def needed_libraries(dynamic_section: str) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic_section)


def vector_operations(disassembly: str, mnemonic: str) -> Counter[str]:
    """How many operations of a kind work on registers of each width."""
    return Counter(re.findall(rf"\b{mnemonic}\s.*%([xyz]mm)\d+\s*$", disassembly, re.MULTILINE))


def test_the_extension_needs_no_torch_and_no_cuda() -> None:
    libraries = needed_libraries(output_of("readelf", "--dynamic", "--wide"))
    assert any(name.startswith(("libstdc++", "libc++")) for name in libraries), libraries
    assert [name for name in libraries if FOREIGN.match(name)] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="function multiversioning is for x86-64")
@pytest.mark.parametrize(("mnemonic", "fewest"), [("vpmulld", MULTIPLIES), ("vaddps", ADDS), (r"vfmadd\d+ps", FUSED)])
def test_the_loops_are_avx512_and_avx2_code(mnemonic: str, fewest: int) -> None:
    if "GCC" not in output_of("readelf", "--string-dump=.comment"):
        pytest.skip("target_clones is used with gcc alone")
    operations = vector_operations(output_of("objdump", "--disassemble", "--no-show-raw-insn"), mnemonic)
    assert operations["zmm"] >= fewest, operations
    assert operations["ymm"] >= fewest, operations


def test_the_readers_see_what_they_look_for() -> None:
    assert needed_libraries(" 0x1 (NEEDED)  Shared library: [libtorch_cpu.so]\n 0x2 (SONAME) Library: [x]") == [
        "libtorch_cpu.so"
    ]
    assert FOREIGN.match("libtorch_cpu.so")
    assert FOREIGN.match("libcudart.so.13")
    disassembly = "  1: vpmulld %zmm1,%zmm2,%zmm3\n  2: vpmulld (%rax),%ymm1,%ymm2\n  3: vmovd %xmm0,%eax\n"
    assert vector_operations(disassembly, "vpmulld") == {
        "zmm": 1,
        "ymm": 1,
    }
