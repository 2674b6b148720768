"""The C++/CUDA extension: addresses and sizes in, no checks. Its callers check shapes, dtypes and ranges."""

has_cuda: bool
max_permutation_size: int
max_streams: int

def permutation_cpu(n: int, *, seed: int, epoch: int, start: int, count: int, out: int, num_threads: int) -> None: ...
def permutation_cuda(
    n: int, *, seed: int, epoch: int, start: int, count: int, out: int, device: int, stream: int
) -> None: ...
def gather_rows_cpu(
    *, codes: int, code_bytes: int, num_categories: int, rows: int, count: int, out: int, out_bytes: int
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
        limits: int,
        streams: list[tuple[int, int, int]],
        src_seq_len: int,
        num_targets: int,
        out_bytes: int,
    ) -> None: ...
    def cpu(self, anchors: int, batch_size: int, sources: int, targets: int, num_labels: int) -> None: ...
    def cuda(
        self, anchors: int, batch_size: int, sources: int, targets: int, num_labels: int, device: int, stream: int
    ) -> None: ...
