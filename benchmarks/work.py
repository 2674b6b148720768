"""What each op's work needs, counted from its shapes: the benchmarks and the roofline count it here."""

import torch

from profiling.roofline import Work

CACHE_BYTES = 32 << 20
"""A table of at most this size is counted as read from a cache, a larger one as read from memory."""
INDEX_BYTES = 8
ID_BYTES = 4


def multi_embedding(num_events: int, sizes: tuple[int, ...], dim: int, dtype: torch.dtype, is_backward: bool) -> Work:
    """Ids and rows read, output written; backward: upstream read, gradient written, float32 sums read and written."""
    num_bytes = num_events * (ID_BYTES * len(sizes) + dim * dtype.itemsize)
    row_bytes = dim * dtype.itemsize
    if is_backward:
        num_bytes += num_events * dim * dtype.itemsize + sum(sizes) * dim * dtype.itemsize
        row_bytes += 2 * 4 * dim
    cached = [size for size in sizes if size * dim * dtype.itemsize <= CACHE_BYTES]
    num_uncached = len(sizes) - len(cached)
    return Work(
        operations=0.0,
        bytes=num_bytes + num_events * num_uncached * row_bytes,
        events=num_events,
        cache_bytes=num_events * len(cached) * row_bytes,
        cache_size=sum(cached) * dim * dtype.itemsize,
    )


def multi_head_cross_entropy(
    num_rows: int, sizes: tuple[int, ...], dim: int, dtype: torch.dtype, label_bytes: int, is_backward: bool
) -> Work:
    """One product forward and two backward; hidden and weight read, and again with gradients of theirs written."""
    num_products, num_passes = (3, 3) if is_backward else (1, 1)
    return Work(
        operations=2.0 * num_products * num_rows * sum(sizes) * dim,
        bytes=num_passes * (num_rows + sum(sizes)) * dim * dtype.itemsize + num_rows * len(sizes) * label_bytes,
        events=num_rows,
    )


def attention(case: tuple[int, int, int, int, int, bool], itemsize: int, is_backward: bool) -> Work:
    """Two products forward and four backward, of the scores that are seen; scores computed again are not counted.

    Args:
        case: batch, heads, queries, keys, head dim, is_causal.
        itemsize: bytes of an element.
        is_backward: whether a backward follows the forward.
    """
    batch_size, num_heads, num_queries, num_keys, head_dim, is_causal = case
    num_scores = num_queries * (num_queries + 1) // 2 if is_causal else num_queries * num_keys
    num_products = 6 if is_backward else 2
    num_rows = 2 * (num_queries + num_keys) * (2 if is_backward else 1)
    return Work(
        operations=2.0 * num_products * head_dim * num_scores * batch_size * num_heads,
        bytes=batch_size * num_heads * num_rows * head_dim * itemsize,
        events=batch_size * num_queries,
    )


def permutation(num_indices: int) -> Work:
    """The indices written, once."""
    return Work(operations=0.0, bytes=INDEX_BYTES * num_indices, events=num_indices)


def gather(num_rows: int, num_categories: int, code_bytes: int) -> Work:
    """Codes read and ids written; a row of a window is one event."""
    return Work(operations=0.0, bytes=num_rows * num_categories * (code_bytes + ID_BYTES), events=num_rows)
