"""Tails, draws and states on a GPU: the same bits in any batch, and what the logits say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline
from logitmill.kernels.logits import Tiles, log_tail_mass, row_statistics, top_k
from logitmill.kernels.sampling import draw
from test_gpu import MODEL, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_tails_of_wide_rows() -> None:
    logits = torch.randn(
        70, 151_936, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    logits *= torch.linspace(0.1, 20, 70, device="cuda")[:, None]
    exact = logits.double()
    ids, _ = top_k(logits, 20)
    targets, tiles = torch.zeros(70, dtype=torch.int64, device="cuda"), Tiles.of(logits)
    statistics = row_statistics(logits, targets, tiles=tiles)
    rest = exact.scatter(1, ids.long(), -torch.inf).logsumexp(1) - exact.logsumexp(1)
    found = log_tail_mass(logits.clone(), statistics, ids, tiles)
    torch.testing.assert_close(found.double(), rest, rtol=2e-6, atol=5e-6)
    tiles = Tiles.of(logits[9:10])
    alone = row_statistics(logits[9:10], targets[:1], tiles=tiles)
    assert torch.equal(log_tail_mass(logits[9:10].clone(), alone, ids[9:10], tiles), found[9:10])


def test_draws_do_not_depend_on_other_rows() -> None:
    made = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(300, 151_936, device="cuda", generator=made) * 3
    keys = torch.arange(300, device="cuda") * 977
    together = draw(logits, keys, 12)
    for rows in (slice(0, 1), slice(5, 38), slice(299, 300)):
        assert torch.equal(draw(logits[rows], keys[rows], 12), together[rows])
    # exp differs by a last bit between devices: hardly any draw does.
    here = draw(logits[:40].cpu(), keys[:40].cpu(), 12)
    assert (here == together[:40].cpu()).float().mean() > 0.999


@pytest.mark.parametrize("settings", [{}, {"quantization": "fp8", "fp8_head": True}])
def test_states_replay_and_extras_keep_their_bits(settings) -> None:
    wanted = {"top_k": 20, "num_draws": 12}
    one = pipeline(MODEL, device="cuda", max_batch_tokens=1024, **settings)
    many = pipeline(MODEL, device="cuda", max_batch_tokens=65536, **settings)
    states: dict[int, list[torch.Tensor]] = {}

    def keep(index: int, doc_id: str, first: int, rows: torch.Tensor) -> None:
        states.setdefault(index, []).append(rows.clone())

    alone = [next(iter(one.score(text, **wanted))) for text in texts()]
    for expected, score in zip(alone, many.score(texts(), on_states=keep, **wanted), strict=True):
        for name, values in vars(expected.tokens).items():
            assert np.array_equal(values, getattr(score.tokens, name)), name
        tokens, rows = score.tokens, torch.cat(states[score.index])
        logits = torch.cat([z for _, z in one.replay(rows)])
        target = logits.gather(1, torch.from_numpy(tokens.token_id)[:, None].long())[:, 0]
        top = logits.gather(1, torch.from_numpy(tokens.top1_id)[:, None].long())[:, 0]
        again = (target - top) + torch.from_numpy(tokens.top1_logprob)
        assert np.array_equal(again.numpy().view(np.int32), tokens.logprob.view(np.int32))
