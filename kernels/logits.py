"""What is kept of rows of logits: statistics of a distribution, its largest entries, a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .choice import has_triton

TILE = 128
"""Columns of one tile, of which a row has `ceil(V / TILE)`."""
MAX_K = 256
"""The most entries of a row that `top_k` returns."""
_LARGEST = 0x7FFFFFFF
# Rows whose scratch exists at a time where torch computes: a few million numbers, which the
# allocator reuses instead of mapping fresh pages for every chunk.
_ROWS = 16


class RowStatistics(NamedTuple):
    """One value a row, all float32 nats but for `rank` (int32) and `top1_id` (int32)."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    varentropy: torch.Tensor
    rank: torch.Tensor
    top1_id: torch.Tensor
    top1_logprob: torch.Tensor
    logsumexp: torch.Tensor

    @classmethod
    def unpack(cls, packed_7R: torch.Tensor) -> RowStatistics:
        """Views of one float32 buffer that holds the fields in order, integers as their bits.

        One copy of the buffer to the host thus takes all of them.
        """
        columns = list(packed_7R.unbind())
        for i in (cls._fields.index("rank"), cls._fields.index("top1_id")):
            columns[i] = columns[i].view(torch.int32)
        return cls(*columns)


class Tiles(NamedTuple):
    """What is known of the tiles of rows, contiguous float32 [R, N], N = ceil(V / TILE).

    The maxima lead to a row's largest entries, and the totals to the mass of all others; either
    takes another reading of the rows otherwise.
    """

    maxima_RN: torch.Tensor
    """All NaN in a row that holds a NaN or +inf."""
    totals_RN: torch.Tensor
    """Sums of exp(z - max z) over a tile; 0 where all of it is -inf."""

    @classmethod
    def of(cls, logits_RV: torch.Tensor) -> Tiles:
        """Room for those of these rows, with anything in it."""
        num_rows, num_columns = logits_RV.shape
        return cls(*logits_RV.new_empty(2, num_rows, -(-num_columns // TILE)))


def row_statistics(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    out_7R: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> RowStatistics:
    """Log-probability of the targets and the shape of each row's distribution.

    With m = max z, w = exp(z - m), s = sum w and log p = z - m - log s:

        logsumexp  = m + log s
        entropy    = log s - sum w (z - m) / s
        varentropy = sum w (z - m)^2 / s - (sum w (z - m) / s)^2
        rank       = 1 + #{j : z_j > z_target}
        top1_id    = the lowest j with z_j = m

    Both moments are taken about m, whose neighbourhood holds the mass, so that a confident row
    does not cancel. A logit of -inf weighs nothing. A row that holds a NaN or +inf, or nothing
    but -inf, comes out as NaN; its rank means nothing and its top1_id is some column.

    Args:
        logits_RV: float32, contiguous but for the distance between rows; left as it is.
        targets_R: int64 with values in [0, V).
        out_7R: where the result goes, for `RowStatistics.unpack`: float32, its rows contiguous,
            for example some columns of the buffer of a whole batch.
        tiles: what receives the maxima and totals of the rows' tiles, for `top_k` and
            `log_tail_mass`.
    """
    if out_7R is None:
        out_7R = logits_RV.new_empty(len(RowStatistics._fields), len(logits_RV))
    if has_triton(logits_RV):
        from .gpu import logits

        logits.row_statistics(logits_RV, targets_R, out_7R, tiles)
        return RowStatistics.unpack(out_7R)
    result = RowStatistics.unpack(out_7R)
    for start in range(0, len(logits_RV), _ROWS):
        rows = slice(start, start + _ROWS)
        part = RowStatistics(*(column[rows] for column in result))
        of_part = Tiles(*(column[rows] for column in tiles)) if tiles is not None else None
        _fill(part, logits_RV[rows], targets_R[rows], of_part)
    return result


def _fill(
    out: RowStatistics,
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    tiles: Tiles | None,
) -> None:
    """The formulas of `row_statistics`, term by term."""
    target_R1 = logits_RV.gather(1, targets_R[:, None])
    tiles_RN = _tile_maxima(logits_RV)
    max_R, top1_R = _first_max(logits_RV, tiles_RN)
    # Ones in float32 add up exactly to 2^24, and faster than booleans do.
    weight = torch.empty_like(logits_RV)
    rank = torch.gt(logits_RV, target_R1, out=weight).sum(1) + 1
    shifted = logits_RV - max_R[:, None]
    torch.exp(shifted, out=weight)
    total = weight.sum(1)
    weight *= shifted
    mean = _sum_numbers(weight) / total
    weight *= shifted
    square = _sum_numbers(weight) / total
    log_total = total.log()
    out.logprob.copy_(target_R1[:, 0] - max_R - log_total)
    out.entropy.copy_(log_total - mean)
    out.varentropy.copy_((square - mean.square()).clamp_min_(0.0))
    out.rank.copy_(rank)
    out.top1_id.copy_(top1_R)
    out.top1_logprob.copy_(-log_total)
    out.logsumexp.copy_(max_R + log_total)
    if tiles is not None:
        tiles.totals_RN.copy_(_tile_totals(logits_RV, tiles_RN))
        sound_R1 = (max_R < torch.inf)[:, None]
        tiles.maxima_RN.copy_(tiles_RN.masked_fill_(~sound_R1, torch.nan))


def _sum_numbers(terms_RV: torch.Tensor) -> torch.Tensor:
    """Sums of rows in which 0 * -inf, a NaN, counts as nothing.

    A row of logits that holds a NaN of its own has a total of NaN to say so. Rows whose plain sum
    is a number keep it, which is faster and has the same bits beside any others.
    """
    sums = terms_RV.sum(1)
    broken = sums.isnan()
    return torch.where(broken, terms_RV.nansum(1), sums) if broken.any() else sums


def _tile_maxima(logits_RV: torch.Tensor) -> torch.Tensor:
    """Maxima of tiles of `TILE` columns, the last of which may be short; [R, ceil(V / TILE)]."""
    num_columns = logits_RV.shape[1]
    whole = num_columns // TILE * TILE
    maxima = logits_RV[:, :whole].unflatten(1, (-1, TILE)).amax(2)
    if whole == num_columns:
        return maxima
    return torch.cat([maxima, logits_RV[:, whole:].amax(1, keepdim=True)], dim=1)


def _tile_totals(logits_RV: torch.Tensor, maxima_RN: torch.Tensor) -> torch.Tensor:
    """Sums of exp(z - maximum) over tiles that have these maxima; [R, ceil(V / TILE)]."""
    whole = logits_RV.shape[1] // TILE * TILE
    # A tile of -inf counts from a finite number, lest -inf - -inf be a NaN.
    pivots = maxima_RN.clamp(min=torch.finfo(torch.float32).min)[:, :, None]
    shifted = logits_RV[:, :whole].unflatten(1, (-1, TILE)) - pivots[:, : whole // TILE]
    totals = shifted.exp_().sum(2)
    if whole == logits_RV.shape[1]:
        return totals
    last = (logits_RV[:, whole:] - pivots[:, -1]).exp_().sum(1, keepdim=True)
    return torch.cat([totals, last], dim=1)


def _first_max(
    logits_RV: torch.Tensor, maxima_RN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's maximum and the lowest column that holds it.

    The maxima of tiles vectorise where a search for a position does not; then only the first
    tile that holds the maximum is searched.
    """
    tile_R = maxima_RN.argmax(1)
    # Beyond the last column the last one stands in, which is never the first of equals.
    columns = _columns(tile_R[:, None]).clamp_max_(logits_RV.shape[1] - 1)
    found = logits_RV.gather(1, columns)
    return maxima_RN.gather(1, tile_R[:, None])[:, 0], tile_R * TILE + found.argmax(1)


def _columns(tiles_RK: torch.Tensor) -> torch.Tensor:
    """The columns of tiles laid end to end, some beyond the last; [R, K * TILE]."""
    column = torch.arange(TILE, device=tiles_RK.device)
    return (tiles_RK[:, :, None] * TILE + column).flatten(1)


def top_k(
    logits_RV: torch.Tensor, k: int, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row, from the largest; equals by ascending id.

    Exactly the first k of a stable descending sort. In a row that holds a NaN or +inf the ids
    are 0 ... k - 1 and the values NaN.

    Args:
        logits_RV: float32, contiguous but for the distance between rows.
        k: 1 ... 256 and at most V, else ValueError.
        tiles: those of the rows from `row_statistics`, which save a GPU a reading of them.

    Returns:
        (ids int32 [R, k], values float32 [R, k]).
    """
    if not 1 <= k <= min(MAX_K, logits_RV.shape[1]):
        raise ValueError(
            f"k: {k} entries of a row of {logits_RV.shape[1]} logits; "
            f"1 to {min(MAX_K, logits_RV.shape[1])} are possible"
        )
    if has_triton(logits_RV):
        from .gpu import logits

        return logits.top_k(logits_RV, k, tiles)
    parts = [_sort(rows, k) for rows in logits_RV.split(_ROWS)]
    if not parts:
        return logits_RV.new_empty(0, k, dtype=torch.int32), logits_RV.new_empty(0, k)
    ids, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, values


def _sort(logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_k` out of the k tiles with the largest maxima, the first of equals.

    The entries lie in them: whatever lies elsewhere has k maxima before it.
    """
    num_columns = logits_RV.shape[1]
    maxima = _tile_maxima(logits_RV)
    tiles_RK = maxima.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    columns = _columns(tiles_RK)
    candidates = logits_RV.gather(1, columns.clamp(max=num_columns - 1))
    # The value decides and then the lower id: both in one integer that no other entry has, so that
    # any selection will do where a stable sort takes several times as long.
    pairs = (_order(candidates).to(torch.int64) << 32) | (_LARGEST - columns)
    pairs.masked_fill_(columns >= num_columns, torch.iinfo(torch.int64).min)
    ids = _LARGEST - (pairs.topk(k, dim=1).values & _LARGEST)
    sound_R1 = maxima.amax(1, keepdim=True) < torch.inf
    ids = torch.where(sound_R1, ids, torch.arange(k, device=ids.device))
    return ids.to(torch.int32), logits_RV.gather(1, ids).masked_fill_(~sound_R1, torch.nan)


def _order(values: torch.Tensor) -> torch.Tensor:
    """int32 in the order of float32 values; both zeros are 0."""
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & _LARGEST)


def log_tail_mass(
    logits_RV: torch.Tensor,
    statistics: RowStatistics,
    ids_RK: torch.Tensor,
    tiles: Tiles,
) -> torch.Tensor:
    """Log of the mass of all but some entries of each row, float32 [R]; overwrites these entries.

    With m = max z and s = sum exp(z - m) of a whole row, m' and s' of what is left of it:

        log_tail_mass = (m' - m) + (log s' - log s)

    Nothing is taken from 1, where float32 would leave no digit of a tail below 6e-8: tiles that
    lose entries are summed up again, and s' is the sum of all tiles. -inf where nothing is left
    that weighs anything, NaN in a row that has no distribution.

    Args:
        logits_RV: float32, contiguous but for the distance between rows; the entries at `ids_RK`
            are -inf afterwards.
        statistics: of the same rows.
        ids_RK: contiguous int32 [R, K], the columns to leave out, each once.
        tiles: those of the rows from `row_statistics`; of what is left afterwards.
    """
    if has_triton(logits_RV):
        from .gpu import logits

        return logits.log_tail_mass(logits_RV, statistics, ids_RK, tiles)
    top_R = logits_RV.gather(1, statistics.top1_id[:, None].long())[:, 0]
    logits_RV.scatter_(1, ids_RK.long(), -torch.inf)
    for start in range(0, len(logits_RV), _ROWS):
        rows = slice(start, start + _ROWS)
        _sum_again(
            logits_RV[rows], ids_RK[rows] // TILE, Tiles(*(column[rows] for column in tiles))
        )
    rest_R = tiles.maxima_RN.amax(1)
    total_R = (tiles.totals_RN * (tiles.maxima_RN - rest_R[:, None]).exp_()).sum(1)
    # Where the rest weighs nothing its sum means nothing either.
    log_total_R = torch.where(rest_R == -torch.inf, 0.0, total_R.log_())
    return (rest_R - top_R) + (log_total_R + statistics.top1_logprob)


def _sum_again(logits_RV: torch.Tensor, tiles_RK: torch.Tensor, tiles: Tiles) -> None:
    """Maxima and totals of some tiles of each row as they are now."""
    columns = _columns(tiles_RK.long())
    is_column = columns < logits_RV.shape[1]
    entries = logits_RV.gather(1, columns.clamp_(max=logits_RV.shape[1] - 1))
    entries.masked_fill_(~is_column, -torch.inf)
    maxima = _tile_maxima(entries)
    tiles.maxima_RN.scatter_(1, tiles_RK.long(), maxima)
    tiles.totals_RN.scatter_(1, tiles_RK.long(), _tile_totals(entries, maxima))


def narrow(
    logits_RV: torch.Tensor,
    statistics: RowStatistics | None,
    dtype: torch.dtype,
    out_RV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities, or the logits themselves without statistics, rounded once to `dtype`.

    A log-probability is (z - m) + `top1_logprob` with m the logit of `top1_id`: the roundings of
    `row_statistics`, so that in float32 the target's entry equals its `logprob` to the bit.

    Args:
        logits_RV: float32, contiguous but for the distance between rows; left as it is.
        statistics: of the same rows.
        dtype: float16, bfloat16 or float32.
        out_RV: where the result goes, of that dtype and apart from `logits_RV`; its rows are
            contiguous.
    """
    if out_RV is None:
        out_RV = torch.empty_like(logits_RV, dtype=dtype, memory_format=torch.contiguous_format)
    if out_RV.dtype != dtype:
        raise ValueError(f"out_RV: {out_RV.dtype} cannot hold {dtype}")
    if has_triton(logits_RV):
        from .gpu import logits

        logits.narrow(logits_RV, statistics, out_RV)
        return out_RV
    if statistics is None:
        return out_RV.copy_(logits_RV)
    top1_R1 = statistics.top1_id[:, None].long()
    for start in range(0, len(logits_RV), _ROWS):
        rows = slice(start, start + _ROWS)
        part = logits_RV[rows]
        shifted = part - part.gather(1, top1_R1[rows])
        out_RV[rows] = shifted.add_(statistics.top1_logprob[rows, None])
    return out_RV
