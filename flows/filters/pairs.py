"""Filters of one run's documents against another's: joined by id, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...engine.records import OK
from ..compare.distributions import (
    BOUND,
    EXACT,
    Chunks,
    diverge_rows,
    open_topk,
    read_candidates,
)
from ..compare.divergences import diverge_coarsely
from ..compare.pairing import Stream, pair
from ..run import Run
from .columns import batch, check_tier, describe_recipe, floats, split

_COUNTED = ("num_tokens_scored", "num_bytes")


def ifd(conditional: Run, unconditional: Run) -> pa.RecordBatchReader:
    """Instruction-following difficulty: `doc_id, ifd, nll_conditional, nll_unconditional`.

    ppl(answer | instruction) / ppl(answer), of the same tokens in two passes (Li et al., ACL 2024,
    arXiv:2402.00530; in Li et al., NAACL 2024, arXiv:2308.12032, it is the ratio of the two nll):
    the first run read the instruction as context (recipe `conditional`), the second the answer
    alone.
    An empty instruction gives 1; below 1 the instruction helps. Documents that only one run scored
    have no row; `ifd` is null where the answer became other tokens, as at a border between
    instruction and answer that a token goes across.

    Raises:
        ValueError: if the recipes are not such or differ otherwise; on reading, if no answer has
            the same tokens.
    """
    given = conditional.plan["recipe"]
    alone = unconditional.plan["recipe"]
    if given["name"] != "conditional":
        raise ValueError(
            f"conditional: its recipe is {describe_recipe(conditional)}; score it with --recipe "
            "conditional and --context-column"
        )
    if alone["name"] not in ("rolling", "conditional"):
        raise ValueError(
            f"unconditional: its recipe is {describe_recipe(unconditional)}, which does not score "
            "every token of a document; score it with rolling"
        )
    for name in ("context", "prefix"):
        if given[name] != alone[name]:
            raise ValueError(
                f"{name}: {given[name]!r} in the conditional run and {alone[name]!r} in the other; "
                f"score both with one --{name}"
            )
    schema = pa.schema(
        [
            ("doc_id", pa.string()),
            *((name, pa.float64()) for name in ("ifd", "nll_conditional", "nll_unconditional")),
        ]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        num_same = num_other = 0
        for ours, theirs in _pair_documents(conditional, unconditional):
            nll = [floats(t["nll_per_token"]) for t in (ours, theirs)]
            same = _same(ours, theirs)
            num_same, num_other = num_same + same.sum(), num_other + (~same).sum()
            ratio = np.where(same, np.exp(np.minimum(nll[0] - nll[1], 709.0)), np.nan)
            yield batch(schema, ours["doc_id"], ratio, *nll)
        if num_other and not num_same:
            raise ValueError(
                "unconditional: no answer has as many tokens and bytes as in the conditional run; "
                "the runs are not of the same answers, or not of one tokenizer"
            )

    return pa.RecordBatchReader.from_batches(schema, batches())


def excess_loss(run: Run, reference: Run, *, per_token: bool = False) -> pa.RecordBatchReader:
    """Excess loss against a reference: `doc_id, excess_loss`.

    nll(run) - nll(reference), nats a token, mean of a document (RHO-LOSS, Mindermann et al., ICML
    2022, arXiv:2206.07137; of tokens Rho-1, Lin et al., NeurIPS 2024, arXiv:2404.07965): high is
    what the reference knows and the model does not. With `per_token` also `token_excess_loss`, a
    list of the document's tokens, which needs the tier `tokens` in both. Documents that only one
    run scored have no row.

    Raises:
        ValueError: if recipes or tokens differ, the latter on reading: by their ids with
            `per_token`, else by their numbers.
    """
    _check_recipes(run, reference)
    fields = [("doc_id", pa.string()), ("excess_loss", pa.float64())]
    if not per_token:
        schema = pa.schema(fields)
        return pa.RecordBatchReader.from_batches(schema, _excess(schema, run, reference))
    for name, one in (("run", run), ("reference", reference)):
        check_tier(one, name, "tokens")
    schema = pa.schema([*fields, ("token_excess_loss", pa.list_(pa.float32()))])
    return pa.RecordBatchReader.from_batches(schema, _token_excess(schema, run, reference))


def kl_to(run: Run, reference: Run) -> pa.RecordBatchReader:
    """Mean KL(reference || run) over a document's tokens: `doc_id, kl, max_kl, num_tokens`, nats.

    KL(p || q) = sum p (log p - log q) at a token (Kullback and Leibler 1951), p the reference's
    distribution of what comes and q the run's. Exact where both kept the tier `logits`, over the
    whole vocabulary. Else of the tier `topk`, over the tokens that both kept and all the rest as
    one outcome: a lower bound, as outcomes that are not told apart add nothing. It is never
    negative, and 0 for a run compared with itself. The schema's metadata has the `tier`.

    Raises:
        ValueError: if recipes or vocabularies differ, the runs did not both keep one of the tiers,
            or tokens differ, on reading: with `logits` by their numbers.
    """
    _check_recipes(run, reference)
    is_exact = all(EXACT in one.tiers for one in (run, reference))
    if is_exact:
        _check_vocabularies(run, reference)
    else:
        for name, one in (("run", run), ("reference", reference)):
            check_tier(one, name, BOUND)
    schema = pa.schema(
        {
            "doc_id": pa.string(),
            "kl": pa.float64(),
            "max_kl": pa.float64(),
            "num_tokens": pa.int64(),
        },
        {"tier": EXACT if is_exact else BOUND},
    )
    diverge = _exact_divergences if is_exact else _divergences
    return pa.RecordBatchReader.from_batches(schema, diverge(schema, run, reference))


def _pair_documents(run: Run, other: Run) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Scored documents that both runs have."""
    columns = ("status", "nll_per_token", *_COUNTED)
    streams = [Stream(one, "scores", columns) for one in (run, other)]
    for ours, theirs in pair(*streams, on_progress=lambda done, total: None):
        scored = [t["status"].to_numpy() == OK for t in (ours, theirs)]
        both = pa.array(scored[0] & scored[1])
        yield ours.filter(both), theirs.filter(both)


def _same(ours: pa.Table, theirs: pa.Table) -> np.ndarray:
    """Whether a document has as many tokens and bytes in both."""
    same = np.ones(len(ours), bool)
    for name in _COUNTED:
        same &= ours[name].to_numpy() == theirs[name].to_numpy()
    return same


def _excess(schema: pa.Schema, run: Run, reference: Run) -> Iterator[pa.RecordBatch]:
    for ours, theirs in _pair_documents(run, reference):
        _refuse_others(ours["doc_id"], _same(ours, theirs))
        ours_nll, theirs_nll = (floats(t["nll_per_token"]) for t in (ours, theirs))
        yield batch(schema, ours["doc_id"], ours_nll - theirs_nll)


def _token_excess(schema: pa.Schema, run: Run, reference: Run) -> Iterator[pa.RecordBatch]:
    streams = [Stream(one, "tokens", ("token_id", "logprob")) for one in (run, reference)]
    for ours, theirs in pair(*streams, on_progress=lambda done, total: None):
        pairs = zip(split(ours["token_id"]), split(theirs["token_id"]), strict=True)
        _refuse_others(ours["doc_id"], np.array([np.array_equal(a, b) for a, b in pairs], bool))
        lists = [
            # nll of the run less that of the reference.
            theirs_lp.astype(np.float64) - ours_lp
            for ours_lp, theirs_lp in zip(
                split(ours["logprob"]), split(theirs["logprob"]), strict=True
            )
        ]
        means = np.array([excess.mean() for excess in lists], np.float64)
        tokens = pa.array([excess.astype(np.float32) for excess in lists], pa.list_(pa.float32()))
        yield batch(schema, ours["doc_id"], means, tokens)


def _divergences(schema: pa.Schema, run: Run, reference: Run) -> Iterator[pa.RecordBatch]:
    streams = [open_topk(one) for one in (reference, run)]
    for theirs, ours in pair(*streams, on_progress=lambda done, total: None):
        _refuse_others(ours["doc_id"], pc.equal(ours["token_id"], theirs["token_id"]).to_numpy())
        for i in range(len(ours)):
            rows = [table.slice(i, 1) for table in (theirs, ours)]
            kl = diverge_coarsely(*map(read_candidates, rows)).kl_T
            yield batch(schema, ours["doc_id"].slice(i, 1), [kl.mean()], [kl.max()], [len(kl)])


def _exact_divergences(schema: pa.Schema, run: Run, reference: Run) -> Iterator[pa.RecordBatch]:
    with Chunks(reference) as base, Chunks(run) as other:
        for ours, theirs in _pair_documents(run, reference):
            _refuse_others(ours["doc_id"], _same(ours, theirs))
            ids = ours["doc_id"].to_pylist()
            _refuse_others(
                ours["doc_id"],
                np.array([base.num_rows(i) == other.num_rows(i) for i in ids], bool),
            )
            for doc_id in ids:
                found = diverge_rows(base.read(doc_id), other.read(doc_id))
                kl = np.concatenate([apart.kl_T for apart in found])
                yield batch(schema, pa.array([doc_id]), [kl.mean()], [kl.max()], [len(kl)])


def _refuse_others(ids: pa.ChunkedArray, same: np.ndarray) -> None:
    if not same.all():
        doc_id = ids[int(np.flatnonzero(~same)[0])].as_py()
        raise ValueError(
            f"reference: document {doc_id!r} has other tokens there, so the runs are of other "
            "tokenizers or texts; compare their bits_per_byte instead"
        )


def _check_recipes(run: Run, reference: Run) -> None:
    if run.plan["recipe_hash"] != reference.plan["recipe_hash"]:
        raise ValueError(
            f"reference: its recipe is {describe_recipe(reference)}, and the run's "
            f"{describe_recipe(run)}; score both with the same --recipe, --context and --prefix"
        )


def _check_vocabularies(run: Run, reference: Run) -> None:
    ours, theirs = (one.plan["model"]["vocab_size"] for one in (run, reference))
    if ours != theirs:
        raise ValueError(
            f"reference: its logits are over {theirs:,} tokens, and the run's over {ours:,}; score "
            "both with --keep topk"
        )
