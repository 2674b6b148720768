"""The C++/CUDA extension: addresses and sizes in, no checks. Its callers check shapes, dtypes and ranges."""

from collections.abc import Sequence

has_cuda: bool
is_sanitized: bool
"""Built with EVENTKERN_SANITIZE, for .ci/sanitize."""
max_permutation_size: int
max_streams: int

_HeadRows = tuple[int, Sequence[int]]
"""Address and strides of a tensor (batch, head, position, head_dim)."""

class CsvReader:
    """Checks what it is given: whatever the bytes are, it reads inside them."""

    header: list[bytes]
    num_mistakes: int
    next_line: int
    def __init__(self, *, most_bytes: int) -> None: ...
    def read_header(self, block: bytes, is_last: bool) -> int: ...
    def select(self, wanted: Sequence[int], time_field: int) -> None: ...
    def read(self, block: bytes, is_last: bool) -> int: ...
    def lines(self) -> bytes: ...
    def columns(self) -> list[tuple[bytes, bytes]]: ...
    def mistakes(self, most: int) -> list[tuple[str, int, int, int, int]]: ...

def permutation_cpu(
    n: int, *, seed: int, epoch: int, part: int, start: int, count: int, out: int, num_threads: int
) -> None: ...
def permutation_cuda(
    n: int, *, seed: int, epoch: int, part: int, start: int, count: int, out: int, device: int, stream: int
) -> None: ...
def attention_cpu(
    sizes: tuple[int, int, int, int, int],
    is_causal: bool,
    float_type: int,
    num_threads: int,
    query: _HeadRows,
    key: _HeadRows,
    value: _HeadRows,
    output: _HeadRows,
    statistics: int,
    /,
) -> None: ...
def attention_backward_cpu(
    sizes: tuple[int, int, int, int, int],
    is_causal: bool,
    float_type: int,
    num_threads: int,
    grad: _HeadRows,
    query: _HeadRows,
    key: _HeadRows,
    value: _HeadRows,
    output: _HeadRows,
    statistics: int,
    query_grad: _HeadRows,
    key_grad: _HeadRows,
    value_grad: _HeadRows,
    /,
) -> None: ...
def decoder_step_cpu(
    num_layers: int,
    batch_size: int,
    width: int,
    num_heads: int,
    cache_size: int,
    position: int,
    num_memory: int,
    memory_size: int,
    epsilon: float,
    num_threads: int,
    weights: int,
    caches: int,
    memory: int,
    states: int,
    /,
) -> None: ...
def multi_embedding_cpu(
    ids: int,
    id_bytes: int,
    id_strides: tuple[int, int],
    num_events: int,
    table_sizes: Sequence[int],
    dim: int,
    mode: int,
    float_type: int,
    num_threads: int,
    weight: int,
    weight_stride: int,
    out: int,
    /,
) -> int: ...
def multi_embedding_backward_cpu(
    ids: int,
    id_bytes: int,
    id_strides: tuple[int, int],
    num_events: int,
    table_sizes: Sequence[int],
    dim: int,
    mode: int,
    float_type: int,
    num_threads: int,
    out_grad: int,
    out_grad_stride: int,
    weight_grad: int,
    /,
) -> None: ...
def count_targets(
    labels: tuple[int, int, int, int, int], head_sizes: Sequence[int], ignore_index: int, /
) -> tuple[int, list[int]]: ...
def cross_entropy_cpu(
    labels: tuple[int, int, int, int, int],
    head_sizes: Sequence[int],
    ignore_index: int,
    logits: int,
    bias: int,
    float_type: int,
    label_smoothing: float,
    z_loss: float,
    scales: int,
    scales_row_stride: int,
    losses: int,
    losses_row_stride: int,
    totals: int,
    num_threads: int,
    /,
) -> None: ...
def add_rows_cpu(
    matrix: int, float_type: int, num_rows: int, num_columns: int, sums: int, num_threads: int, /
) -> None: ...
def draw_classes_cpu(
    logits: int,
    row_stride: int,
    num_rows: int,
    head_sizes: Sequence[int],
    num_left_out: Sequence[int],
    uniforms: int,
    inverse_temperature: float,
    top_k: int,
    num_threads: int,
    classes: int,
    /,
) -> None: ...

class WindowGather:
    def __init__(
        self,
        *,
        codes: int,
        code_bytes: int,
        num_categories: int,
        cuts: int,
        key: tuple[int, int, int],
        anchors: int,
        limits: int,
        streams: list[tuple[int, int, int]],
        src_seq_len: int,
        num_targets: int,
        out_bytes: int,
    ) -> None: ...
    def cpu(self, windows: int, batch_size: int, sources: int, targets: int, num_labels: int) -> None: ...
    def cuda(
        self, windows: int, batch_size: int, sources: int, targets: int, num_labels: int, device: int, stream: int
    ) -> None: ...

class GatherPool:
    """Threads that gather batches ahead; without any, the one who waits gathers."""

    def __init__(self, *, num_windows: int, num_threads: int) -> None: ...
    def submit(
        self, gather: WindowGather, windows: int, batch_size: int, sources: int, targets: int, num_labels: int
    ) -> int: ...
    def wait(self, ticket: int) -> None: ...
    def close(self) -> None: ...

class RowGather:
    def __init__(self, *, codes: int, code_bytes: int, num_categories: int, num_rows: int) -> None: ...
    def cpu(self, rows: int, count: int, out: int, out_bytes: int, num_threads: int, /) -> int: ...
