"""The rows of each entity as compressed sparse rows, and the check that the gathers need not make."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class EntityIndex:
    """Rows of each entity: entity e owns rows[offsets[e] : offsets[e + 1]], in time order.

    Args:
        entity_of_row: (N,) int32, -1 where the row has no entity.
        offsets: (entities + 1,) int64.
        rows: (M,) int64, M the rows that have an entity.
    """

    entity_of_row: NDArray[np.int32]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]


def index_fault(index: EntityIndex, num_events: int) -> tuple[str, str] | None:
    """The section at fault and what is wrong with it; None: each row with an entity is listed once, in its place."""
    numbers, offsets, rows = index.entity_of_row, index.offsets, index.rows
    if len(numbers) != num_events:
        return "entity_of_row", f"has {len(numbers)} rows where the store has {num_events}"
    if len(offsets) == 0 or offsets[0] != 0:
        return "offsets", "does not begin with 0"
    for start in range(0, len(offsets), BLOCK_ROWS):
        block = offsets[start : start + BLOCK_ROWS + 1]  # one more: the step into the next block counts too
        is_back = block[1:] < block[:-1]
        if is_back.any():
            return "offsets", f"decreases after entity {start + int(is_back.argmax())}"
    if offsets[-1] != len(rows):
        return "offsets", f"ends with {offsets[-1]} where {len(rows)} rows are listed"
    num_listed, num_entities = 0, len(offsets) - 1
    for start in range(0, num_events, BLOCK_ROWS):
        owners = numbers[start : start + BLOCK_ROWS]
        if owners.min() < -1 or owners.max() >= num_entities:
            bad = start + int(((owners < -1) | (owners >= num_entities)).argmax())
            return "entity_of_row", f"holds {numbers[bad]} at row {bad}, and there are {num_entities} entities"
        num_listed += int(np.count_nonzero(owners >= 0))
    if num_listed != len(rows):
        return "rows", f"lists {len(rows)} rows where {num_listed} have an entity"
    before, before_owner = -1, -1
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        if block.min() < 0 or block.max() >= num_events:
            bad = start + int(((block < 0) | (block >= num_events)).argmax())
            return "rows", f"holds {rows[bad]} at position {bad}, and there are {num_events} events"
        positions, owners = np.arange(start, start + len(block)), numbers[block]
        is_foreign = (owners < 0) | (positions < offsets[owners]) | (positions >= offsets[owners + 1])
        if is_foreign.any():
            bad = start + int(is_foreign.argmax())
            return "rows", f"holds {rows[bad]} at position {bad}, a row of another entity"
        is_same = owners == np.concatenate(([before_owner], owners[:-1]))
        is_back = is_same & (block <= np.concatenate(([before], block[:-1])))
        if is_back.any():
            bad = start + int(is_back.argmax())
            return "rows", f"holds {rows[bad]} at position {bad}, out of time order"
        before, before_owner = int(block[-1]), int(owners[-1])
    return None
