"""The CUDA sources and the Triton kernels compile for every card that is served, and keep values in registers."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

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


class TritonCase(NamedTuple):
    """A kernel as its launcher calls it. A type is spelled as Triton spells it; `:16` says divisible by 16."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]  # constexprs and compile options, those that the launcher's own choice gave included
    choose: Callable[[int], dict[str, Any]] | None = None  # what the launcher chooses by compute capability


class Usage(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int


def multi_embedding_cases() -> list[TritonCase]:
    from eventkern.ops.multi_embedding import triton, triton_multi_hot, triton_segments

    sizes = (1000, 60, 4097, 17, 3, 2, 1) + (1000,) * 10
    tables = {"SIZES": sizes, "FIRST_ROWS": tuple(accumulate(sizes[:-1], initial=0))}
    lanes = {"STARTS": tables["FIRST_ROWS"], "NUM_LANES": sum(sizes)}
    rows = dict.fromkeys(("num_rows", "ids_stride_n", "ids_stride_c"), "i64")
    ids = {"ids_ptr": "*i64:16", **rows}
    columns = {"COLUMNS": tuple(range(17)), "SENTINEL": sum(sizes)}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def forward(dim: int, dtype: str, is_concat: bool) -> TritonCase:
        types = {
            **ids, "weight_ptr": f"*{dtype}:16", "sums_ptr": "*fp32:16", "is_valid_ptr": "*i8:16",
            "output_ptr": f"*{dtype}:16", "weight_stride": "i64:16", "output_stride": "i64:16",
        }  # fmt: skip
        flags = {"IS_CONCAT": is_concat, "HAS_SUMS": not is_concat, "HAS_VALIDITY": is_concat, "DIVISOR": 17}
        constants = {**tables, **flags, **triton.forward_options(dim, dtypes[dtype])}
        return TritonCase(f"forward {dtype} {dim}", triton.forward_kernel, types, constants)

    def multi_hot(dim: int, dtype: str, is_concat: bool, choose: Callable[..., dict[str, int]]) -> TritonCase:
        types = {
            **ids, "grad_ptr": f"*{dtype}:16", "output_ptr": "*fp32:16", "rows_per_split": "i64",
            "grad_stride": "i64:16",
        }  # fmt: skip
        flags = {"IS_CONCAT": is_concat, "IS_SPLIT": True, "DIVISOR": 1}
        constants = {**tables, **lanes, **flags, **choose(dim, dtypes[dtype], sum(sizes))}
        return TritonCase(f"{choose.__name__} {dtype} {dim}", triton_multi_hot.multi_hot_kernel, types, constants)

    def segments(dim: int, dtype: str, is_concat: bool) -> TritonCase:
        types = {
            "grad_ptr": f"*{dtype}:16", "keys_ptr": "*i32:16", "order_ptr": "*i64:16", "gradient_ptr": f"*{dtype}:16",
            "carry_ptr": "*fp32:16", "num_entries": "i64", "num_rows": "i64", "grad_stride": "i64:16",
        }  # fmt: skip
        flags = {"IS_CONCAT": is_concat, "DIVISOR": 17}
        constants = {**columns, **flags, **triton_segments.segments_options(dim, dtypes[dtype])}
        return TritonCase(f"segments {dtype} {dim}", triton_segments.segments_kernel, types, constants)

    def carries(dim: int, dtype: str) -> TritonCase:
        types = {"keys_ptr": "*i32:16", "carry_ptr": "*fp32:16", "gradient_ptr": f"*{dtype}:16", "num_entries": "i64"}
        options = triton_segments.carries_options(dim, dtypes[dtype])
        constants = {"SENTINEL": sum(sizes), "DIVISOR": 17, **options}
        return TritonCase(f"carries {dtype} {dim}", triton_segments.carries_kernel, types, constants)

    first, again = triton_multi_hot.multi_hot_options, triton_multi_hot.mending_options
    return [
        forward(64, "bf16", False),
        forward(1024, "fp32", False),
        forward(5, "fp16", True),
        TritonCase(
            "validity", triton.validity_kernel, {**ids, "is_valid_ptr": "*i8:16"},
            {"SIZES": sizes, "IS_FIRST": False, **triton.validity_options()},
        ),
        multi_hot(128, "bf16", False, first),
        multi_hot(64, "fp16", True, first),
        multi_hot(1024, "fp32", True, first),
        multi_hot(64, "fp32", False, first),
        multi_hot(128, "bf16", False, again),
        multi_hot(64, "fp32", True, again),
        TritonCase(
            "splits", triton_multi_hot.splits_kernel,
            {"partials_ptr": "*fp32:16", "gradient_ptr": "*bf16:16", "num_splits": "i32"},
            {**tables, **lanes, "DIVISOR": 17, **triton_multi_hot.splits_options(256)},
        ),
        TritonCase(
            "keys", triton_segments.keys_kernel, {**ids, "keys_ptr": "*i32:16"},
            {**tables, **columns, **triton_segments.keys_options()},
        ),
        segments(256, "bf16", True),
        segments(64, "fp32", False),
        carries(256, "bf16"),
        carries(64, "fp32"),
    ]  # fmt: skip


def multi_head_cross_entropy_cases() -> list[TritonCase]:
    from eventkern.ops.multi_head_cross_entropy import triton, triton_backward, triton_chunks
    from eventkern.ops.multi_head_cross_entropy.triton_tiles import count_tiles

    events, mixed, words = (1000,) * 17, (1000, 60, 17, 4, 3, 2), (50_257,)
    long = (
        "num_rows", "num_pieces", "target_stride_n", "target_stride_h", "grad_stride_n", "grad_stride_h",
        "ignore_index", "num_elements", "first_row", "last_row",
    )  # fmt: skip
    float32 = (
        "losses_ptr", "log_sum_exp_ptr", "grad_losses_ptr", "terms_ptr", "logits_ptr", "bias_sums_ptr",
    )  # fmt: skip
    typed = {**dict.fromkeys(long, "i64"), **dict.fromkeys(float32, "*fp32:16"), "targets_ptr": "*i64:16"}
    typed |= {"label_smoothing": "fp32", "z_loss": "fp32", "hidden_stride": "i32:16", "weight_stride": "i32:16"}

    def case(name, kernel, dtype, constants, choose=None, out=None) -> TritonCase:
        """Arguments by their names; those not named are in the inputs' dtype, or counts."""
        types = {}
        for argument in kernel.params:
            if not argument.is_constexpr:
                other = f"*{dtype}:16" if argument.name.endswith("_ptr") else "i32"
                is_out = "out_ptr" in argument.name or argument.name == "partials_ptr"
                types[argument.name] = out if out and is_out else typed.get(argument.name, other)
        return TritonCase(name, kernel, types, constants, choose)

    def by_shapes(dim: int, dtype: str, sizes: tuple[int, ...], is_plain: bool) -> list[TritonCase]:
        itemsize = 4 if dtype == "fp32" else 2
        name = f"{dtype} {dim} {'plain' if is_plain else 'smoothed'} {len(sizes)}"
        flags = {
            "HEAD_SIZES": sizes, "DIM": dim, "HAS_BIAS": not is_plain, "HAS_SMOOTHING": not is_plain,
            "PRECISION": "tf32x3", "UPCAST": False, "IS_SPLIT": not is_plain, "NEEDS_WEIGHT": True,
            "NEEDS_BIAS": not is_plain, "NUM_CLASSES": sum(sizes),
        }  # fmt: skip

        def made(kernel, choose, out=None) -> TritonCase:
            def chosen(capability: int) -> dict[str, Any]:
                constants = choose(dim, itemsize, sizes, capability)
                constants["NUM_TILES"] = count_tiles(sizes, constants["BLOCK_V"])
                return {name: value for name, value in constants.items() if name in names or name in OPTIONS}

            names = kernel.arg_names
            constants = {name: value for name, value in flags.items() if name in names}
            return case(f"{kernel.__name__} {name}", kernel, dtype, constants, chosen, out)

        cases = [made(triton.forward_kernel, triton.forward_constants, "*fp32:16")]
        if not triton_backward.is_wide(dim, itemsize):
            out = None if is_plain else "*fp32:16"
            cases.append(made(triton_backward.grad_hidden_kernel, triton_backward.hidden_constants, out))
            cases.append(made(triton_backward.grad_weight_kernel, triton_backward.weight_constants, out))
        return cases

    shapes = [
        (64, "bf16", events, True), (64, "fp16", mixed, False), (128, "bf16", events, False),
        (256, "bf16", mixed, False), (256, "fp16", events, True), (768, "bf16", words, True), (33, "bf16", mixed, True),
        (32, "fp32", mixed, False), (64, "fp32", events, False), (768, "fp32", words, True),
    ]  # fmt: skip
    heads, smoothed = {"HEAD_SIZES": events}, {"HAS_SMOOTHING": True}
    tile = {"BLOCK_N": triton_chunks.BLOCK_N, "BLOCK_V": triton_chunks.BLOCK_V, "HAS_BIAS": True, "NEEDS_BIAS": True}
    return [
        *(one for shape in shapes for one in by_shapes(*shape)),
        case(
            "combine", triton.combine_kernel, "fp32", {**heads, **smoothed, "BLOCK_V": 64, **triton.COMBINE_CONSTANTS}
        ),
        case("row_terms", triton_backward.row_terms_kernel, "bf16", {**heads, **triton_backward.ROW_TERMS_CONSTANTS}),
        case(
            "sum_splits", triton_backward.sum_splits_kernel, "bf16", triton_backward.SUM_CONSTANTS, out="*bf16:16"
        )._replace(),
        case(
            "grad_logits", triton_chunks.grad_logits_kernel, "bf16",
            {"HEAD_SIZES": words, **smoothed, **tile, "num_warps": triton_chunks.NUM_WARPS},
        ),
    ]  # fmt: skip


OPTIONS = ("num_warps", "num_stages", "maxnreg")
TRITON_CASES: dict[str, Callable[[], list[TritonCase]]] = {
    "multi_embedding": multi_embedding_cases,
    "multi_head_cross_entropy": multi_head_cross_entropy_cases,
}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that one block may have

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter stands in for the compiler in this process"
)


def triton_usage(case: TritonCase, capability: int, folder: Path) -> Usage:
    """Compile one case, and read from the binary what a thread and a block of it need."""
    triton = pytest.importorskip("triton", reason="triton exists for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = {**case.constants, **(case.choose(capability) if case.choose else {})}
    signature = {name: case.types.get(name, "constexpr").partition(":")[0] for name in names}
    divisible = [(names.index(name),) for name, spelled in case.types.items() if spelled.endswith(":16")]
    source = ASTSource(
        case.kernel, signature,
        {name: value for name, value in constants.items() if name in names},
        {position: [["tt.divisibility", 16]] for position in divisible},
    )  # fmt: skip
    options = {name: value for name, value in constants.items() if name not in names}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert found is not None, report
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local, binary.metadata.shared)


@needs_compiler
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("op", TRITON_CASES)
def test_no_triton_kernel_spills(op: str, capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton exists for Linux alone")
    usages = {case.name: triton_usage(case, capability, tmp_path) for case in TRITON_CASES[op]()}
    for name, usage in usages.items():
        print(f"sm_{capability} {op} {name}: {usage}")
    assert len(usages) == len(TRITON_CASES[op]())
    assert not {name: usage for name, usage in usages.items() if usage.spilled_bytes}
    assert max(usage.registers for usage in usages.values()) <= 255
    assert max(usage.shared_bytes for usage in usages.values()) <= SHARED_BYTES[capability]


@needs_compiler
def test_a_triton_kernel_that_spills_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton exists for Linux alone")
    case = next(case for case in multi_embedding_cases() if case.name == "multi_hot_options bf16 128")
    assert triton_usage(case._replace(constants={**case.constants, "num_warps": 4}), 80, tmp_path).spilled_bytes > 0
