"""Statistics of a row of logits against float64, by definition: torch's and the kernel's.

Also copies of rows in narrower numbers. Without a GPU the kernels are interpreted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitmill.kernels import logits as torch_logits
from logitmill.kernels.logits import RowStatistics, Tiles, narrow, row_statistics
from oracles import entropy, row_statistics_float64, varentropy, zipf

TILE = torch_logits.TILE
FLOATS = ("logprob", "entropy", "varentropy", "top1_logprob", "logsumexp", "maxima")
# Few columns a step: short rows take several, and each is quick to interpret.
SMALL = {"lanes": 128, "depth": 2, "warps": 1}


@pytest.fixture(params=["torch", "kernel", "kernel as it ships"])
def run(request: pytest.FixtureRequest, device: torch.device):  # type: ignore[no-untyped-def]
    """(logits, targets) -> the statistics, maxima and totals of tiles, by their names.

    The buffers hold NaN before, and the rows lie in a wider tensor of NaN.
    """

    def run_kernel(logits: torch.Tensor, *rest: torch.Tensor) -> None:
        from logitmill.kernels.gpu import logits as gpu

        gpu.row_statistics(logits, *rest, **(SMALL if request.param == "kernel" else {}))

    def run_torch(
        logits: torch.Tensor, targets: torch.Tensor, out: torch.Tensor, tiles: Tiles
    ) -> None:
        result = row_statistics(logits, targets, out_7R=out, tiles=tiles)
        assert result.logprob.data_ptr() == out.data_ptr()

    def run(logits: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        num_rows, num_columns = logits.shape
        where = torch.device("cpu") if request.param == "torch" else device
        wide = torch.full((num_rows, num_columns + 5), torch.nan, device=where)
        rows = wide[:, :num_columns]
        rows.copy_(torch.from_numpy(logits.astype(np.float32)))
        before = rows.clone()
        out = torch.full((7, num_rows + 3), torch.nan, device=where)[:, 2:-1]
        tiles = Tiles(*(column.fill_(torch.nan) for column in Tiles.of(rows)))
        indices = torch.from_numpy(targets.astype(np.int64)).to(where)
        (run_torch if request.param == "torch" else run_kernel)(rows, indices, out, tiles)
        assert torch.equal(rows.view(torch.int32), before.view(torch.int32)), "changed the logits"
        result = RowStatistics.unpack(out.cpu())._asdict()
        of_tiles = {"maxima": tiles.maxima_RN.cpu(), "totals": tiles.totals_RN.cpu()}
        return {name: c.numpy() for name, c in {**result, **of_tiles}.items()}

    return run


def assert_matches(run, logits: np.ndarray, targets: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    logits = logits.astype(np.float32)
    found, expected = run(logits, targets), row_statistics_float64(logits, targets)
    for name in ("rank", "top1_id"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("logprob", "entropy", "top1_logprob", "logsumexp"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=5e-6)
    np.testing.assert_allclose(found["varentropy"], expected["varentropy"], rtol=1e-4, atol=1e-4)
    assert (found["varentropy"] >= 0).all()
    starts = np.arange(0, logits.shape[1], TILE)
    maxima = np.maximum.reduceat(logits, starts, axis=1)
    np.testing.assert_array_equal(found["maxima"], maxima)
    about = np.repeat(maxima.astype(np.float64), TILE, axis=1)[:, : logits.shape[1]]
    totals = np.add.reduceat(np.exp(logits - about), starts, axis=1)
    np.testing.assert_allclose(found["totals"], totals, rtol=2e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 1300), st.integers(1, 5), st.floats(0.01, 30))
def test_random_rows(run, seed: int, vocab_size: int, num_rows: int, spread: float) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(seed)
    logits = draw.normal(scale=spread, size=(num_rows, vocab_size)) + draw.normal(scale=50)
    assert_matches(run, logits, draw.integers(vocab_size, size=num_rows))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(2, 600))
def test_ties_share_the_better_rank_and_the_lowest_id_is_first(
    run, seed: int, vocab_size: int
) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(seed)
    logits = draw.integers(-2, 3, size=(8, vocab_size))
    assert_matches(run, logits, draw.integers(vocab_size, size=8))


def test_ties_by_hand(run) -> None:  # type: ignore[no-untyped-def]
    logits = np.array([[1.0, 3.0, 3.0, 2.0]] * 4)
    found = run(logits, np.arange(4))
    assert found["rank"].tolist() == [4, 1, 1, 3]
    assert found["top1_id"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 3e37])
def test_far_from_zero(run, offset: float) -> None:  # type: ignore[no-untyped-def]
    logits = np.array([[0.0, -1.0, -30.0], [0.0, 0.0, -1e4]]) + offset
    assert_matches(run, logits, np.array([2, 0]))


def test_one_hot_row_is_certain(run) -> None:  # type: ignore[no-untyped-def]
    logits = np.full((2, 1000), -200.0)
    logits[:, 7] = 200.0
    found = run(logits, np.array([7, 8]))
    assert found["logprob"].tolist() == [0.0, -400.0]
    assert found["entropy"].tolist() == [0.0, 0.0]
    assert found["varentropy"].tolist() == [0.0, 0.0]
    assert found["rank"].tolist() == [1, 2]


@pytest.mark.parametrize("size", [3, 1000])
def test_impossible_tokens_weigh_nothing(run, size: int) -> None:  # type: ignore[no-untyped-def]
    """A masked token has a logit of -inf: fine unless it is what came."""
    logits = np.full((2, size), -np.inf)
    logits[:, [0, size - 1]] = 5.0
    found = run(logits, np.array([0, 1]))
    assert found["logprob"].tolist() == [pytest.approx(-np.log(2)), -np.inf]
    assert found["entropy"].tolist() == [pytest.approx(np.log(2))] * 2
    assert found["varentropy"].tolist() == [0.0, 0.0]
    assert found["rank"].tolist() == [1, 3]
    assert found["top1_id"].tolist() == [0, 0]
    weights = [2.0] if size == 3 else [1.0, *[0.0] * 6, 1.0]
    assert found["totals"].tolist() == [weights] * 2


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("column", [0, 30, 299])
def test_a_row_that_holds_a_nan_says_so_and_leaves_the_others_alone(  # type: ignore[no-untyped-def]
    run, bad: float, column: int
) -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(3, 300)).astype(np.float32)
    targets = np.array([1, 2, 3])
    expected = run(logits, targets)
    logits[1, column] = bad
    found = run(logits, targets)
    for name in FLOATS:
        assert np.isnan(found[name][1]).all()
    assert 0 <= found["top1_id"][1] < 300
    for name in expected:
        np.testing.assert_array_equal(found[name][[0, 2]], expected[name][[0, 2]])


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_row_without_numbers(run, value: float) -> None:  # type: ignore[no-untyped-def]
    found = run(np.full((2, 300), value), np.array([0, 299]))
    for name in FLOATS:
        if name != "maxima" or value != -np.inf:
            assert np.isnan(found[name]).all()
    assert ((found["top1_id"] >= 0) & (found["top1_id"] < 300)).all()


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (256, 5.545177444),
        (32_000, 10.373491182),
        (50_257, 10.824905120),
        (128_256, 11.761783546),
        (151_936, 11.931214659),
    ],
)
def test_uniform_rows(run, vocab_size: int, expected: float) -> None:  # type: ignore[no-untyped-def]
    found = run(np.full((1, vocab_size), 3.25), np.array([vocab_size - 1]))
    assert found["logprob"][0] == pytest.approx(-expected, rel=1e-6)
    assert found["entropy"][0] == pytest.approx(expected, rel=1e-6)
    assert found["varentropy"][0] == 0.0
    assert found["rank"][0] == 1


def test_zipf_row(run) -> None:  # type: ignore[no-untyped-def]
    p = zipf(1000)
    found = run(np.log(p)[None], np.array([9]))
    assert entropy(p) == pytest.approx(5.191011033, abs=1e-9)
    assert varentropy(p) == pytest.approx(4.580029538, abs=1e-9)
    assert found["entropy"][0] == pytest.approx(5.191011033, rel=1e-6)
    assert found["varentropy"][0] == pytest.approx(4.580029538, rel=1e-5)
    assert found["rank"][0] == 10


def test_confident_rows_do_not_cancel(run) -> None:  # type: ignore[no-untyped-def]
    """E[x^2] - E[x]^2 about zero would lose these: p(top) = 1 - 3e-5 at a logit of 1e4."""
    logits = np.full((1, 8), 1e4 - 12.0)
    logits[0, 3] = 1e4
    expected = row_statistics_float64(logits.astype(np.float32), np.array([3]))
    found = run(logits, np.array([3]))
    np.testing.assert_allclose(found["varentropy"], expected["varentropy"], rtol=1e-3)
    np.testing.assert_allclose(found["entropy"], expected["entropy"], rtol=1e-3)


@pytest.mark.parametrize("size", [1000, 1013, 1024])
def test_a_row_has_the_same_bits_alone(run, size: int) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(1)
    logits = draw.normal(scale=4, size=(21, size))
    targets = draw.integers(size, size=21)
    together = run(logits, targets)
    for rows in (slice(0, 1), slice(17, 18), slice(3, 21)):
        alone = run(logits[rows], targets[rows])
        for name in alone:
            np.testing.assert_array_equal(alone[name], together[name][rows])


def test_a_rising_row_moves_every_sum(run) -> None:  # type: ignore[no-untyped-def]
    """Each step of the scan has a higher maximum than the last."""
    rising = np.linspace(-40, 9, 1400)
    assert_matches(run, np.stack([rising, rising[::-1], np.abs(rising)]), np.array([0, 700, 1399]))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 4096, 4097])
def test_the_first_of_equal_maxima_anywhere(run, size: int) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(size)
    logits = draw.normal(size=(4, size))
    for row in logits:
        row[draw.integers(size, size=3)] = 6.0
    assert_matches(run, logits, draw.integers(size, size=4))


@pytest.fixture(params=["torch", "kernel"])
def narrowed(request: pytest.FixtureRequest, device: torch.device):  # type: ignore[no-untyped-def]
    """`narrow` of rows in host memory, into a buffer of NaN."""

    def run(
        logits: torch.Tensor, statistics: RowStatistics | None, dtype: torch.dtype
    ) -> torch.Tensor:
        wide = torch.full((len(logits), logits.shape[1] + 3), torch.nan, dtype=dtype)
        if request.param == "torch":
            out = wide[:, :-3]
            assert narrow(logits, statistics, dtype, out) is out
            return out
        from logitmill.kernels.gpu import logits as gpu

        if statistics is not None:
            statistics = RowStatistics(*(column.to(device) for column in statistics))
        out = wide.to(device)[:, :-3]
        gpu.narrow(logits.to(device), statistics, out)
        return out.cpu()

    return run


def draw_rows(num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(num_columns)
    logits = torch.randn(5, num_columns, generator=draw) * 6 + 20
    return logits, torch.randint(num_columns, (5,), generator=draw)


@pytest.mark.parametrize("size", [1, 129, 4097])
def test_a_log_probability_is_the_same_in_a_row_and_in_its_statistics(  # type: ignore[no-untyped-def]
    narrowed, size: int
) -> None:
    logits, targets = draw_rows(size)
    statistics = row_statistics(logits, targets)
    wide = narrowed(logits, statistics, torch.float32)
    rows = torch.arange(5)
    assert torch.equal(wide[rows, targets], statistics.logprob)
    assert torch.equal(wide.amax(1), statistics.top1_logprob)
    expected = torch.log_softmax(logits.double(), 1)
    torch.testing.assert_close(wide.double(), expected, rtol=2e-6, atol=5e-6)
    assert torch.equal(wide, narrow(logits, statistics, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_are_rounded_once(narrowed, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    logits, targets = draw_rows(300)
    statistics = row_statistics(logits, targets)
    wide = narrow(logits, statistics, torch.float32)
    assert torch.equal(narrowed(logits, statistics, dtype), wide.to(dtype))
    assert torch.equal(narrowed(logits, None, dtype), logits.to(dtype))


def test_a_row_of_nan_is_narrowed_to_nan(narrowed) -> None:  # type: ignore[no-untyped-def]
    logits, targets = draw_rows(300)
    logits[2, 7] = torch.nan
    found = narrowed(logits, row_statistics(logits, targets), torch.float16)
    assert found.isnan().all(1).tolist() == [False, False, True, False, False]


def test_a_buffer_of_another_dtype_is_refused() -> None:
    logits, _ = draw_rows(3)
    with pytest.raises(ValueError, match="float16"):
        narrow(logits, None, torch.float16, logits)
