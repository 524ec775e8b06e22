"""Statistics, largest entries and narrow copies of rows of logits, each in one read of the row.

What a row gives depends on its numbers, its length and the alignment of rows alone: the shape of
the loop and the order of its sums are fixed, so neither the number of rows nor a row's place
among them moves a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..logits import TILE, RowStatistics, Tiles

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# exp(-200) is 0 in float32 and -200 is finite: a logit of -inf weighs nothing in any moment.
_FLOOR = tl.constexpr(-200.0)
_LEAST = tl.constexpr(-(2**31))
_TILE = tl.constexpr(TILE)

# A step of the scan takes DEPTH x LANES columns. Each lane keeps sums of its own, so that nothing
# is exchanged between threads before the row ends.
_LANES = 512
_DEPTH = 4
_WARPS = 4
# Columns of one program of `narrow`.
_BLOCK = 4096
# Candidates of `top_k` that are given their places at a time.
_PART = 2048
# Tiles that `log_tail_mass` sums up again at a time.
_AGAIN = 16


@triton.jit
def _below(x, top):
    """x - top, floored; NaN where either is NaN or both are infinite."""
    return tl.maximum(x - top, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lower(total, first, second, by):
    """Sums of w, w t and w t^2 with w = exp(t), once every t has changed by `by` <= 0."""
    scale = tl.exp(by)
    square = second + by * (2.0 * first + by * total)
    return scale * total, scale * (first + by * total), scale * square


@triton.jit
def _scan(z, step, target, top, total, first, second, above, found):
    """The lanes' state after DEPTH more logits each, `z` [DEPTH, LANES]."""
    highest = tl.max(z, axis=0)
    found = tl.where(highest > top, step, found)
    # A lane that has seen only -inf counts from a finite number, lest -inf - -inf be a NaN.
    before = tl.maximum(top, _LOWEST)
    top = tl.maximum(top, highest)
    pivot = tl.maximum(top, _LOWEST)
    total, first, second = _lower(total, first, second, _below(before, pivot))
    t = _below(z, pivot[None, :])
    w = tl.exp(t)
    total += tl.sum(w, axis=0)
    w *= t
    first += tl.sum(w, axis=0)
    second += tl.sum(w * t, axis=0)
    above += tl.sum((z > target).to(tl.int32), axis=0)
    return top, total, first, second, above, found


@triton.jit
def _sum_tiles(z):
    """Maxima of tiles, `z` [tiles, TILE], and sums of exp(z - maximum) over them."""
    value = tl.max(z, axis=1)
    return value, tl.sum(tl.exp(_below(z, tl.maximum(value, _LOWEST)[:, None])), axis=1)


@triton.jit
def _store_tiles(z, maxima, totals, step, num_tiles, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """What is known of the tiles of step `step` to a row of `maxima` and of `totals`."""
    tiles: tl.constexpr = DEPTH * LANES // _TILE
    tile = step * tiles + tl.arange(0, tiles)
    value, total = _sum_tiles(tl.reshape(z, (tiles, _TILE)))
    tl.store(maxima + tile, value, mask=tile < num_tiles)
    tl.store(totals + tile, total, mask=tile < num_tiles)


@triton.jit(do_not_specialize=["num_rows", "out_stride"])
def _row_statistics(
    logits,
    targets,
    out,
    maxima,
    totals,
    num_rows,
    num_columns,
    row_stride,
    out_stride,
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    num_tiles = tl.cdiv(num_columns, _TILE)
    maxima += row.to(tl.int64) * num_tiles
    totals += row.to(tl.int64) * num_tiles
    target = tl.load(logits + tl.load(targets + row))

    lane = tl.arange(0, LANES)
    offset = tl.arange(0, DEPTH)[:, None] * LANES + lane[None, :]
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    first = tl.zeros((LANES,), tl.float32)
    second = tl.zeros((LANES,), tl.float32)
    above = tl.zeros((LANES,), tl.int32)
    found = tl.zeros((LANES,), tl.int32)
    whole = num_columns // (DEPTH * LANES)
    for step in range(0, whole):
        z = tl.load(logits + step * (DEPTH * LANES) + offset)
        top, total, first, second, above, found = _scan(
            z, step, target, top, total, first, second, above, found
        )
        if TILES:
            _store_tiles(z, maxima, totals, step, num_tiles, DEPTH, LANES)
    if whole * (DEPTH * LANES) < num_columns:
        column = whole * (DEPTH * LANES) + offset
        z = tl.load(logits + column, mask=column < num_columns, other=float("-inf"))
        top, total, first, second, above, found = _scan(
            z, whole, target, top, total, first, second, above, found
        )
        if TILES:
            _store_tiles(z, maxima, totals, whole, num_tiles, DEPTH, LANES)

    peak = tl.max(top, axis=0)
    pivot = tl.maximum(peak, _LOWEST)
    total, first, second = _lower(total, first, second, _below(tl.maximum(top, _LOWEST), pivot))
    total = tl.sum(total, axis=0)
    mean = tl.sum(first, axis=0) / total
    square = tl.sum(second, axis=0) / total
    if TILES and total != total:
        # Other threads wrote some of these.
        tl.debug_barrier()
        tile = tl.arange(0, LANES)
        for start in range(0, num_tiles, LANES):
            poison = tl.full((LANES,), float("nan"), tl.float32)
            tl.store(maxima + start + tile, poison, mask=start + tile < num_tiles)
    # A row of -inf has no distribution.
    total = tl.where(peak == float("-inf"), float("nan"), total)
    log_total = tl.log(total)

    # The first step that reached the peak, and in it the lanes that did, are read once more.
    reached = top == peak
    earliest = tl.min(tl.where(reached, found, 0x7FFFFFFF), axis=0)
    column = earliest * (DEPTH * LANES) + offset
    again = (reached & (found == earliest))[None, :] & (column < num_columns)
    z = tl.load(logits + column, mask=again, other=float("-inf"))
    column = tl.where(again & (z == peak), column, num_columns)
    top_id = tl.min(tl.min(column, axis=1), axis=0)
    # No entry of a row of NaN equals its peak.
    top_id = tl.where(top_id < num_columns, top_id, 0)

    rank = tl.sum(above, axis=0) + 1
    varentropy = tl.maximum(square - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # The order of the fields of `RowStatistics`.
    out += row
    stride = out_stride.to(tl.int64)
    tl.store(out, target - peak - log_total)
    tl.store(out + stride, log_total - mean)
    tl.store(out + 2 * stride, varentropy)
    tl.store(out + 3 * stride, rank.to(tl.float32, bitcast=True))
    tl.store(out + 4 * stride, top_id.to(tl.float32, bitcast=True))
    tl.store(out + 5 * stride, -log_total)
    tl.store(out + 6 * stride, peak + log_total)


def row_statistics(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    out_7R: torch.Tensor,
    tiles: Tiles | None,
    *,
    lanes: int = _LANES,
    depth: int = _DEPTH,
    warps: int = _WARPS,
) -> None:
    """`kernels.logits.row_statistics` into `out_7R`, and into `tiles` if they are given."""
    num_rows, num_columns = logits_RV.shape
    _row_statistics[(num_rows,)](
        logits_RV,
        targets_R,
        out_7R,
        *(tiles if tiles is not None else (out_7R, out_7R)),
        num_rows,
        num_columns,
        logits_RV.stride(0),
        out_7R.stride(0),
        TILES=tiles is not None,
        DEPTH=depth,
        LANES=lanes,
        num_warps=warps,
        enable_fp_fusion=True,
    )


@triton.jit
def _key(bits):
    """Integers in the order of the floats that have these bits; both zeros are 0.

    Bits that are all ones, a NaN, come before those of any number.
    """
    bits = tl.where(bits == _LEAST, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load_keys(bits, mask):
    """Keys of numbers by pointers to their bits; what is masked is less than all of them."""
    return _key(tl.load(bits, mask=mask, other=-1))


@triton.jit
def _bounds(key, low, k):
    """Two bounds with the k-th largest of `key` at or above the lower and below the upper.

    At least k entries reach `low`. What lies between the bounds is halved until exactly k entries
    reach the lower, or all entries between are equal. Returns both and how many entries reach
    the upper, fewer than k.
    """
    low = low.to(tl.int64)
    high = tl.max(key).to(tl.int64) + 1
    reach_low = tl.sum((key >= low.to(tl.int32)).to(tl.int32))
    reach_high = reach_low * 0
    while (reach_low > k) & (high - low > 1):
        middle = (low + high) >> 1
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32))
        enough = count >= k
        low = tl.where(enough, middle, low)
        reach_low = tl.where(enough, count, reach_low)
        high = tl.where(enough, high, middle)
        reach_high = tl.where(enough, reach_high, count)
    return low.to(tl.int32), high.to(tl.int32), reach_high


@triton.jit
def _places(key, low, high, spare, sure_before, equal_before):
    """Which entries are kept and where: all that reach `high`, `spare` of those below it.

    The counts are those of earlier parts of the row; the new ones are returned.
    """
    sure = key >= high
    equal = (key >= low) & (key < high)
    # Fewer than 512 are sure: one running sum counts both.
    both = sure.to(tl.int32) | (equal.to(tl.int32) << 9)
    before = tl.cumsum(both, axis=0) - both
    earlier = (before >> 9) + equal_before
    keep = sure | (equal & (earlier < spare))
    place = (before & 511) + sure_before + tl.minimum(earlier, spare)
    both = tl.sum(both, axis=0)
    return keep, place, sure_before + (both & 511), equal_before + (both >> 9)


@triton.jit(do_not_specialize=["num_tiles"])
def _choose_tiles(maxima, tiles, num_tiles, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of the KEPT tiles with the largest maxima, ascending."""
    row = tl.program_id(0).to(tl.int64)
    maxima += row * num_tiles
    tile = tl.arange(0, BLOCK)
    seen = tile < num_tiles
    key = _load_keys(maxima + tile, seen)
    # In a row of NaN all tiles are equal, and the first ones are taken.
    peak = tl.load(maxima).to(tl.float32, bitcast=True)
    key = tl.where(peak == peak, key, tl.where(seen, 0, _LEAST))
    lowest = tl.min(tl.where(seen, key, 0x7FFFFFFF), axis=0)
    low, high, sure = _bounds(key, lowest, KEPT)
    keep, place, _, _ = _places(key, low, high, KEPT - sure, 0, 0)
    tl.store(tiles + row * KEPT + place, tile, mask=keep)


@triton.jit
def _candidates(logits, tiles, place, lane, num_columns, KEPT: tl.constexpr):
    """Keys of the entries `lane` of the tiles at `place`, and which of these entries exist."""
    tile = tl.load(tiles + place, mask=place < KEPT, other=0)
    column = tile * _TILE + lane
    seen = (place < KEPT) & (column < num_columns)
    return _load_keys(logits + column, seen), seen


@triton.jit(do_not_specialize=["num_columns", "num_tiles"])
def _choose_slots(
    logits,
    maxima,
    tiles,
    slots,
    num_columns,
    num_tiles,
    row_stride,
    k,
    KEPT: tl.constexpr,
    ENOUGH: tl.constexpr,
    TILES: tl.constexpr,
    PART: tl.constexpr,
):
    """Where the k largest entries lie in the KEPT tiles laid end to end, ascending.

    Nothing is written for a row of NaN, whose entries have no order.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    maxima += row * num_tiles
    tiles += row * KEPT
    peak = tl.load(maxima).to(tl.float32, bitcast=True)
    sound = peak == peak
    place = tl.arange(0, TILES)[:, None]
    lane = tl.arange(0, _TILE)[None, :]
    key, seen = _candidates(logits, tiles, place, lane, num_columns, KEPT)
    if ENOUGH:
        # Each of k tiles holds its maximum: the least of the maxima is reached k times.
        each = tl.arange(0, TILES)
        tile = tl.load(tiles + each, mask=each < KEPT, other=0)
        least = _load_keys(maxima + tile, each < KEPT)
        lowest = tl.min(tl.where(each < KEPT, least, 0x7FFFFFFF), axis=0)
    else:
        lowest = tl.min(tl.where(seen, key, 0x7FFFFFFF))
    low, high, sure = _bounds(key, lowest, k)
    # A running sum over all of them at once would not fit the registers: they are read again,
    # end to end, since a sum along a reshaped tensor takes minutes to compile.
    spare = k - sure
    sure = sure * 0
    equal = sure
    for start in range(0, KEPT * _TILE, PART):
        slot = start + tl.arange(0, PART)
        entry, _ = _candidates(logits, tiles, slot // _TILE, slot % _TILE, num_columns, KEPT)
        keep, to, sure, equal = _places(entry, low, high, spare, sure, equal)
        to = tl.where(sound, to, k)
        tl.store(slots + row * k + to, slot, mask=keep & (to < k))


@triton.jit(do_not_specialize=["num_tiles"])
def _sort(
    logits,
    maxima,
    tiles,
    slots,
    ids,
    values,
    num_tiles,
    row_stride,
    k,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ids and values of the chosen entries, from the largest; equals by ascending id."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    peak = tl.load(maxima + row * num_tiles).to(tl.float32, bitcast=True)
    sound = peak == peak
    place = tl.arange(0, BLOCK)
    seen = place < k
    slot = tl.load(slots + row * k + place, mask=seen, other=0)
    slot = tl.where(sound, slot, 0)
    tile = tl.load(tiles + row * KEPT + slot // _TILE)
    # In a row of NaN the first columns, all as good as each other.
    column = tl.where(sound, tile * _TILE + slot % _TILE, place)
    key = _load_keys(logits + column, seen)
    key = tl.where(peak == peak, key, tl.where(seen, 0, _LEAST))
    # The value decides and then the lower id: both in one integer that no other entry has.
    pair = (key.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    pair = tl.sort(pair, descending=True)
    column = 0x7FFFFFFF - (pair & 0x7FFFFFFF).to(tl.int32)
    value = tl.load(logits + column, mask=seen, other=0).to(tl.float32, bitcast=True)
    tl.store(ids + row * k + place, column, mask=seen)
    tl.store(values + row * k + place, tl.where(sound, value, float("nan")), mask=seen)


def top_k(
    logits_RV: torch.Tensor, k: int, of_rows: Tiles | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.logits.top_k`: first the k tiles that hold the entries, then the entries."""
    num_rows, num_columns = logits_RV.shape
    num_tiles = triton.cdiv(num_columns, TILE)
    device = logits_RV.device
    if of_rows is None:
        of_rows = Tiles.of(logits_RV)
        targets = torch.zeros(num_rows, dtype=torch.int64, device=device)
        row_statistics(logits_RV, targets, logits_RV.new_empty(7, num_rows), of_rows)
    # The search is one of integers.
    bits_RV, maxima_RN = logits_RV.view(torch.int32), of_rows.maxima_RN.view(torch.int32)
    kept = min(k, num_tiles)
    tiles = torch.empty(num_rows, kept, dtype=torch.int32, device=device)
    slots = torch.empty(num_rows, k, dtype=torch.int32, device=device)
    ids = torch.empty_like(slots)
    values = logits_RV.new_empty(num_rows, k)
    block = triton.next_power_of_2(num_tiles)
    _choose_tiles[(num_rows,)](maxima_RN, tiles, num_tiles, KEPT=kept, BLOCK=block, num_warps=4)
    room = triton.next_power_of_2(kept)
    _choose_slots[(num_rows,)](
        bits_RV,
        maxima_RN,
        tiles,
        slots,
        num_columns,
        num_tiles,
        bits_RV.stride(0),
        k,
        KEPT=kept,
        ENOUGH=kept == k,
        TILES=room,
        PART=min(room * TILE, _PART),
        num_warps=slot_warps(room),
    )
    _sort[(num_rows,)](
        bits_RV,
        maxima_RN,
        tiles,
        slots,
        ids,
        values,
        num_tiles,
        bits_RV.stride(0),
        k,
        KEPT=kept,
        BLOCK=triton.next_power_of_2(k),
        num_warps=1 if k <= 64 else 4,
    )
    return ids, values


def slot_warps(tiles: int) -> int:
    """Warps of `_choose_slots`: each thread holds 16 to 64 candidates."""
    return min(16, max(1, tiles // 4))


@triton.jit(do_not_specialize=["num_columns", "num_tiles", "k"])
def _log_tail_mass(
    logits,
    ids,
    top_id,
    top_logprob,
    maxima,
    totals,
    out,
    num_columns,
    num_tiles,
    row_stride,
    k,
    ENTRIES: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leaves the entries out, sums their tiles up again, and then all tiles."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    ids += row.to(tl.int64) * k
    maxima += row.to(tl.int64) * num_tiles
    totals += row.to(tl.int64) * num_tiles
    peak = tl.load(logits + tl.load(top_id + row))
    entry = tl.arange(0, ENTRIES)
    left_out = tl.load(ids + entry, mask=entry < k, other=0)
    # All threads have the peak before any thread overwrites it, and see what the others wrote.
    tl.debug_barrier()
    tl.store(logits + left_out, float("-inf"), mask=entry < k)
    tl.debug_barrier()
    lane = tl.arange(0, _TILE)[None, :]
    for start in range(0, k, AGAIN):
        place = start + tl.arange(0, AGAIN)
        changed = tl.load(ids + place, mask=place < k, other=0) // _TILE
        column = changed[:, None] * _TILE + lane
        seen = (place < k)[:, None] & (column < num_columns)
        most, weight = _sum_tiles(tl.load(logits + column, mask=seen, other=float("-inf")))
        # A tile that comes twice has the same both times.
        tl.store(maxima + changed, most, mask=place < k)
        tl.store(totals + changed, weight, mask=place < k)
    tl.debug_barrier()
    tile = tl.arange(0, BLOCK)
    value = tl.load(maxima + tile, mask=tile < num_tiles, other=float("-inf"))
    total = tl.load(totals + tile, mask=tile < num_tiles, other=0.0)
    rest = tl.max(value, axis=0)
    share = tl.exp(_below(tl.maximum(value, _LOWEST), tl.maximum(rest, _LOWEST)))
    log_total = tl.log(tl.sum(total * share, axis=0))
    # Where the rest weighs nothing its sum means nothing either.
    log_total = tl.where(rest == float("-inf"), 0.0, log_total)
    tl.store(out + row, (rest - peak) + (log_total + tl.load(top_logprob + row)))


def log_tail_mass(
    logits_RV: torch.Tensor, statistics: RowStatistics, ids_RK: torch.Tensor, tiles: Tiles
) -> torch.Tensor:
    """`kernels.logits.log_tail_mass`, which reads no more of a row than the tiles that change."""
    num_rows, num_columns = logits_RV.shape
    num_tiles, k = tiles.maxima_RN.shape[1], ids_RK.shape[1]
    out_R = logits_RV.new_empty(num_rows)
    _log_tail_mass[(num_rows,)](
        logits_RV,
        ids_RK,
        statistics.top1_id,
        statistics.top1_logprob,
        *tiles,
        out_R,
        num_columns,
        num_tiles,
        logits_RV.stride(0),
        k,
        ENTRIES=triton.next_power_of_2(k),
        AGAIN=_AGAIN,
        BLOCK=triton.next_power_of_2(num_tiles),
        num_warps=_WARPS,
    )
    return out_R


@triton.jit(do_not_specialize=["num_rows"])
def _narrow(
    logits,
    top_id,
    top_logprob,
    out,
    num_rows,
    num_columns,
    row_stride,
    out_stride,
    LOGPROBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_stride
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < num_columns
    z = tl.load(logits + column, mask=seen, other=0.0)
    if LOGPROBS:
        peak = tl.load(logits + tl.load(top_id + row))
        z = (z - peak) + tl.load(top_logprob + row)
    tl.store(out + column, z.to(out.dtype.element_ty), mask=seen)


def narrow(logits_RV: torch.Tensor, statistics: RowStatistics | None, out_RV: torch.Tensor) -> None:
    """`kernels.logits.narrow` into `out_RV`."""
    num_rows, num_columns = logits_RV.shape
    _narrow[(num_rows, triton.cdiv(num_columns, _BLOCK))](
        logits_RV,
        statistics.top1_id if statistics is not None else logits_RV,
        statistics.top1_logprob if statistics is not None else logits_RV,
        out_RV,
        num_rows,
        num_columns,
        logits_RV.stride(0),
        out_RV.stride(0),
        LOGPROBS=statistics is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
