"""Examples of stored distributions: aligned, dealt out, and refused where they do not fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from direct import score_directly
from flow_helpers import write_lines
from forks import CONTEXT
from logitmill.engine import EngineSettings, Pipeline, Recipe, pipeline
from logitmill.engine.losses import full_kl, sampled_cross_entropy, top_k_kl
from logitmill.flows import Run, open_run, rows
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.verify import verify_run
from oracles import table_model
from torch.utils.data import DataLoader

V = 4096


@pytest.fixture(scope="module")
def made(corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of the same corpus by what they keep."""
    spec = CorpusSpec(uri=str(corpus), shard_bytes=3_000)
    out = tmp_path_factory.mktemp("runs")
    small: Any = {"engine": EngineSettings(max_batch_tokens=2_000)}

    def score(tiers: list[str], **options: Any) -> Run:
        return score_directly(demo_folder, spec, out, tiers=tiers, **small, **options)

    return {
        "few": score(["topk", "sampled"], top_k=5, num_draws=6),
        "hidden": score(["tokens", "hidden"]),
        "logits": score(["tokens", "logits"], logits_dtype="float16"),
    }


@pytest.fixture
def run(made: Any) -> Run:
    return made["few"]


@pytest.fixture(scope="module")
def readers() -> Any:
    """What measures the rate of reading."""
    path = Path(__file__).parents[2] / "infra/benchmarks/readers.py"
    spec = importlib.util.spec_from_file_location("readers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(examples: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Examples by document and place, each there once."""
    found: dict[str, dict[str, Any]] = {}
    for example in examples:
        name = f"{example['doc_id']} {example['first_row']}"
        assert name not in found
        found[name] = example
    return found


def names(examples: Iterable[dict[str, Any]]) -> list[str]:
    return [f"{e['doc_id']} {e['first_row']}" for e in examples]


def test_row_i_is_the_distribution_of_what_follows_input_i(run: Run, demo: Pipeline) -> None:
    for example in run.distillation(vocab_size=V, spans=True):
        stored = run.document(example["doc_id"])["topk"]
        inputs, n = example["input_ids"], len(stored["token_id"])
        assert inputs.dtype == torch.int64 and inputs[0] == 0 and len(inputs) == n
        assert torch.equal(inputs[1:], example["target_ids"][:-1])
        logprobs = demo.get_logits(inputs).log_softmax(-1)
        kept = logprobs.gather(1, example["top_ids"].long())
        np.testing.assert_allclose(example["top_logprobs"], kept, rtol=6e-4, atol=2e-5)
        target = logprobs.gather(1, example["target_ids"][:, None])[:, 0]
        np.testing.assert_allclose(example["logprob"], target, atol=2e-5)
        for name in ("byte_start", "byte_end"):
            np.testing.assert_array_equal(example[name], stored[name])
        logits = demo.get_logits(inputs)
        loss = top_k_kl(
            logits, example["top_ids"], example["top_logprobs"], example["log_tail_mass"]
        )
        assert 0 <= loss.item() < 1e-5, "the teacher is no different from itself"


def test_spans_are_the_text_of_the_targets(run: Run, demo_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    for example in run.distillation("sampled", vocab_size=V, spans=True):
        text = (Path(run.plan["uri"]) / example["doc_id"]).read_bytes()
        ends = list(zip(example["byte_start"].tolist(), example["byte_end"].tolist(), strict=True))
        assert b"".join(text[a:b] for a, b in ends) == text
        for i in (0, 5, len(ends) - 1):
            assert text[slice(*ends[i])].decode() == tokenizer.decode(example["target_ids"][i])


@pytest.mark.parametrize("shuffle_buffer", [0, 3])
@pytest.mark.parametrize("tier", ["topk", "sampled"])
def test_pieces_are_rows_of_their_document_and_hold_no_others(
    run: Run, tier: str, shuffle_buffer: int
) -> None:
    whole = {e["doc_id"]: e for e in run.distillation(tier, vocab_size=V, spans=True)}
    pieces = run.distillation(
        tier, vocab_size=V, spans=True, context=7, shuffle_buffer=shuffle_buffer
    )
    found = list(pieces)
    assert sum(len(e["input_ids"]) for e in found) == sum(
        len(e["input_ids"]) for e in whole.values()
    )
    for piece in found:
        first, document = piece["first_row"], whole[piece["doc_id"]]
        assert piece.keys() == document.keys()
        for name in piece.keys() - {"doc_id", "first_row"}:
            rows = document[name][first : first + 7]
            assert piece[name].dtype == rows.dtype
            assert torch.equal(piece[name], rows)
            assert piece[name].untyped_storage().nbytes() == piece[name].nbytes
            piece[name].zero_()  # nobody else's


def test_ids_of_a_large_vocabulary(run: Run, readers: Any, tmp_path: Path) -> None:
    large = readers.enlarge(run, tmp_path / "large", 150_000)
    other = np.random.default_rng(0).permutation(150_000)
    was = collect(run.distillation(vocab_size=V, context=7))
    for name, example in collect(large.distillation(vocab_size=150_000, context=7)).items():
        assert example["top_ids"].dtype == torch.int32
        np.testing.assert_array_equal(example["top_ids"], other[was[name]["top_ids"]])
        assert torch.equal(example["top_logprobs"], was[name]["top_logprobs"])


def test_what_reading_costs_is_told(
    run: Run, readers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_PASSES", 1)
    cells = readers.measure(run)
    sizes = [p["bytes"] for p in run.manifest["parts"] if p["name"].startswith("topk/")]
    assert cells["bytes a token"] == f"{sum(sizes) / run.manifest['tokens']:.0f}"
    assert len(cells) == 6 and all(rate.endswith(" M") for rate in list(cells.values())[1:])


def test_draws_stand_in_rows(run: Run, demo: Pipeline) -> None:
    for example in run.distillation("sampled", vocab_size=V):
        stored = run.document(example["doc_id"])["sampled"]
        assert example["sample_ids"].shape == (len(stored["token_id"]), 6)
        for i in (0, len(stored["token_id"]) - 1):
            at = slice(stored["num_ids"][:i].sum(), stored["num_ids"][: i + 1].sum())
            drawn = np.repeat(stored["ids"][at], stored["counts"][at])
            np.testing.assert_array_equal(example["sample_ids"][i], drawn)
        logprobs = demo.get_logits(example["input_ids"]).log_softmax(-1)
        picked = -logprobs.gather(1, example["sample_ids"].long()).mean()
        loss = sampled_cross_entropy(demo.get_logits(example["input_ids"]), example["sample_ids"])
        assert loss.item() == pytest.approx(picked.item(), rel=1e-5)


@pytest.mark.parametrize("context", [None, 37])
def test_whole_distributions_of_logits_and_of_states(
    made: Any, demo: Pipeline, context: int | None
) -> None:
    states = collect(made["hidden"].distillation("hidden", vocab_size=V, context=context))
    replayed = made["hidden"].distillation("hidden", vocab_size=V, context=context, pipe=demo)
    logits = collect(made["logits"].distillation("logits", vocab_size=V, context=context))
    few = collect(made["few"].distillation(vocab_size=V, context=context))
    assert logits.keys() == states.keys() == few.keys()
    for name, example in collect(replayed).items():
        for other in (states[name], logits[name], few[name]):
            for ids in ("input_ids", "target_ids"):
                assert torch.equal(other[ids], example[ids])
        assert context is None or len(example["input_ids"]) <= context
        assert example["logprobs"].shape == (len(example["input_ids"]), V)
        assert logits[name]["logprobs"].dtype == torch.float16
        np.testing.assert_allclose(
            logits[name]["logprobs"], example["logprobs"], rtol=1e-3, atol=0.02
        )
        again = torch.cat([z for _, z in demo.replay(states[name]["states"])]).log_softmax(-1)
        torch.testing.assert_close(again, example["logprobs"], rtol=0, atol=2e-5)
        assert 0 <= full_kl(again, logits[name]["logprobs"]).item() < 1e-5


def test_rows_that_span_row_groups_come_together(
    corpus: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    monkeypatch.setattr(rows, "_GROUP_BYTES", 10 * 256 * 4)
    run = score_directly(
        demo_folder, corpus / "one/file2.py", tmp_path / "runs", tiers=["tokens", "hidden"]
    )
    assert len(run.table("hidden", ["doc_id"])) > 10
    whole = {
        e["doc_id"].split("/")[-1]: e for e in made["hidden"].distillation("hidden", vocab_size=V)
    }
    (example,) = run.distillation("hidden", vocab_size=V)
    torch.testing.assert_close(example["states"], whole["file2.py"]["states"], rtol=0, atol=0)
    pieces = list(run.distillation("hidden", vocab_size=V, context=23))
    assert [p["first_row"] for p in pieces] == list(range(0, len(example["input_ids"]), 23))
    assert torch.equal(torch.cat([p["states"] for p in pieces]), example["states"])
    assert torch.equal(torch.cat([p["input_ids"] for p in pieces]), example["input_ids"])


# ---- order, processes and workers


def test_every_example_comes_once_whoever_reads(run: Run) -> None:
    everything = names(run.distillation(vocab_size=V))
    assert sorted(everything) == sorted(f"{d} 0" for d in run.table()["doc_id"].to_pylist())
    for options in ({}, {"shuffle_buffer": 3, "seed": 5}):
        shared = [
            list(run.distillation(vocab_size=V, rank=r, world_size=3, **options)) for r in range(3)
        ]
        assert all(shared)
        assert sorted(n for part in shared for n in names(part)) == sorted(everything)
    loader = DataLoader(
        run.distillation(vocab_size=V, shuffle_buffer=2),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=CONTEXT,
    )
    assert sorted(names(loader)) == sorted(everything)


def test_a_seed_and_an_epoch_make_the_order(run: Run) -> None:
    def order(epoch: int = 0, **options: Any) -> list[str]:
        dataset = run.distillation(vocab_size=V, shuffle_buffer=4, **options)
        dataset.set_epoch(epoch)
        return names(dataset)

    assert order() == order() != order(seed=1)
    assert order(epoch=1) != order()
    assert sorted(order()) == sorted(order(seed=1)) == sorted(order(epoch=1))
    assert order() != names(run.distillation(vocab_size=V))


@pytest.mark.parametrize("options", [{}, {"shuffle_buffer": 3}, {"context": 40}])
def test_it_goes_on_where_it_was(run: Run, options: Any) -> None:
    dataset = run.distillation(vocab_size=V, **options)
    dataset.set_epoch(2)
    everything = names(dataset)
    examples = iter(dataset)
    first = [next(examples) for _ in range(4)]
    state = json.loads(json.dumps(dataset.state_dict()))
    other = run.distillation(vocab_size=V, **options)
    other.load_state_dict(state)
    assert names(first) + names(other) == everything
    assert names(other) == everything, "the next iteration is a whole one"
    other.load_state_dict(state)
    assert other.state_dict() == state, "a loader asks before it goes on"


# ---- what does not fit


def test_a_token_that_the_student_does_not_have_is_an_error(run: Run, made: Any) -> None:
    top = max(e["top_ids"].max().item() for e in run.distillation(vocab_size=V))
    assert len(list(run.distillation(vocab_size=top + 1)))
    for tier, most in (("topk", top), ("sampled", 50), ("hidden", 50)):
        message = rf"vocab_size: document '.*' has token \d+, which a student of {most} tokens"
        with pytest.raises(ValueError, match=message):
            list(made["hidden" if tier == "hidden" else "few"].distillation(tier, vocab_size=most))
    # A student may have more.
    assert len(list(run.distillation(vocab_size=V + 64)))


def test_a_prefix_that_the_student_does_not_have_is_an_error(tmp_path: Path) -> None:
    table = np.diag(np.full(9, 30.0))
    # The prefix alone is beyond the student's tokens: it is followed by 1, as 1 is.
    table[8] = table[1]
    model = table_model(tmp_path / "model", table)
    corpus = write_lines(tmp_path / "ids.jsonl", [{"ids": [1, 1, 1]}])
    spec = CorpusSpec(uri=str(corpus), ids_column="ids")
    run = score_directly(
        model,
        spec,
        tmp_path / "runs",
        recipe=Recipe(name="rolling", prefix=8),
        tiers=["topk", "sampled"],
        top_k=1,
        num_draws=1,
    )
    for tier in ("topk", "sampled"):
        with pytest.raises(ValueError, match="has token 8, which a student of 8 tokens"):
            list(run.distillation(tier, vocab_size=8))


def test_what_cannot_be_read_is_named_at_once(
    made: Any, run: Run, word_model: Path, demo: Pipeline, demo_folder: Path
) -> None:
    for arguments, message in (
        ({"tier": "tokens"}, "tier: 'tokens' holds no distributions; it is one of topk, sampled"),
        ({"tier": "hidden"}, "tier: 'hidden' was not kept by this run"),
        ({"vocab_size": 0}, "vocab_size: 0 is not at least 1"),
        ({"context": 0}, "context: 0 is not at least 1"),
        ({"shuffle_buffer": -1}, "shuffle_buffer: -1 is not at least 0"),
        ({"rank": 2, "world_size": 2}, "rank: 2 is not one of 2 processes"),
        ({"world_size": 99}, "world_size: 99 processes cannot share"),
        ({"tokenizer": word_model}, "tokenizer: .* has other tokens"),
        ({"tokenizer": "nowhere"}, "tokenizer: 'nowhere' holds none"),
    ):
        with pytest.raises(ValueError, match=message):
            run.distillation(**{"vocab_size": V, **arguments})
    with pytest.raises(ValueError, match="pipe: 'topk' holds probabilities already"):
        run.distillation(vocab_size=V, pipe=demo)
    other = pipeline(demo_folder, device="cpu", fp8_head=True)
    with pytest.raises(ValueError, match=r"pipe: its head is .*, and the states are for"):
        made["hidden"].distillation("hidden", vocab_size=V, pipe=other)
    for tier, options in (("logits", {}), ("hidden", {"pipe": demo})):
        with pytest.raises(ValueError, match="vocab_size: 4160 columns of a student do not go"):
            made[tier].distillation(tier, vocab_size=4160, **options)


def test_the_runs_own_tokenizer_is_taken(run: Run, demo_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    # Saved again it has other bytes and the same tokens.
    AutoTokenizer.from_pretrained(demo_folder).save_pretrained(tmp_path)
    assert len(list(run.distillation(vocab_size=V, tokenizer=tmp_path)))


@pytest.mark.parametrize(
    ("recipe", "tier", "message"),
    [
        (Recipe(name="disjoint", context=64), "topk", "recipe: disjoint leaves tokens out"),
        (
            Recipe(name="strided", context=64, stride=64),
            "topk",
            "recipe: strided leaves tokens out",
        ),
        (
            Recipe(name="llamacpp", context=32),
            "topk",
            "recipe: llamacpp leaves tokens out.* score the corpus again with rolling, .* one text",
        ),
        (Recipe(name="rolling", prefix="none"), "hidden", "tier: without a prefix"),
    ],
)
def test_recipes_whose_rows_do_not_follow_each_other(
    demo_folder: Path, corpus: Path, tmp_path: Path, recipe: Recipe, tier: str, message: str
) -> None:
    tiers = [tier, "tokens"]
    run = score_directly(demo_folder, corpus / "one", tmp_path / "runs", recipe=recipe, tiers=tiers)
    with pytest.raises(ValueError, match=message):
        run.distillation(tier, vocab_size=V)


def test_without_a_prefix_the_first_token_is_the_first_input(
    demo_folder: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    bare = score_directly(
        demo_folder,
        corpus,
        tmp_path / "runs",
        recipe=Recipe(name="rolling", prefix="none"),
        tiers=["topk"],
    )
    with_prefix = collect(run.distillation(vocab_size=V))
    for name, example in collect(bare.distillation(vocab_size=V)).items():
        ids = with_prefix[name]["target_ids"]
        assert torch.equal(example["input_ids"], ids[:-1])
        assert torch.equal(example["target_ids"], ids[1:])


def test_windows_that_overlap_give_each_row_once(
    demo_folder: Path, corpus: Path, tmp_path: Path, run: Run
) -> None:
    windows = score_directly(
        demo_folder,
        corpus,
        tmp_path / "runs",
        recipe=Recipe(name="rolling", context=64),
        tiers=["topk"],
    )
    whole = collect(run.distillation(vocab_size=V))
    for name, example in collect(windows.distillation(vocab_size=V)).items():
        assert torch.equal(example["target_ids"], whole[name]["target_ids"])


def test_what_is_not_the_manifests_is_refused(run: Run, tmp_path: Path, made: Any) -> None:
    copy = Path(shutil.copytree(run.uri.removeprefix("file://"), tmp_path / "copy"))
    part = copy / "topk/part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"run: the sha256 of .*part-00001.parquet is"):
        list(open_run(str(copy)).distillation(vocab_size=V))
    # Tokens of other documents, which nobody holds to their hash.
    states = made["hidden"]
    fewer = Path(shutil.copytree(states.uri.removeprefix("file://"), tmp_path / "fewer"))
    part = max(fewer.glob("tokens/*"), key=lambda path: pq.read_metadata(path).num_rows)
    table = pq.read_table(part)
    assert len(table) > 1
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), part)
    with pytest.raises(ValueError, match=rf"run: hidden/{part.name} has no rows of document"):
        list(open_run(str(fewer)).distillation("hidden", vocab_size=V, check=False))
    # A part of another run.
    other = Path(made["hidden"].uri.removeprefix("file://"))
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps({**plan, "run_key": other.name}))
    with pytest.raises(ValueError, match=r"run: topk/part-00000.parquet is of run '\w+', and"):
        list(open_run(str(copy)).distillation(vocab_size=V, check=False))


def test_a_document_whose_numbers_overflow_is_passed_over(tmp_path: Path) -> None:
    """It has rows, which are kept before it is known, and neither scores nor tokens."""
    from safetensors.torch import load_file, save_file

    table = np.random.default_rng(0).normal(size=(9, 9))
    table[4, 2] = 1e38
    model = table_model(tmp_path / "model", table)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    bad, good = [1, 4, 3, 2], [1, 2, 3]
    files = {"a": [bad, good, bad], "b": [good, bad, good, good], "c": [bad]}
    for name, documents in files.items():
        write_lines(tmp_path / f"corpus/{name}.jsonl", [{"ids": ids} for ids in documents])
    spec = CorpusSpec(uri=str(tmp_path / "corpus/*.jsonl"), ids_column="ids", shard_bytes=64)
    recipe = Recipe(name="rolling", prefix=0)
    for tier in ("hidden", "logits"):
        tiers = ["tokens", tier]
        run = score_directly(model, spec, tmp_path / "runs", recipe=recipe, tiers=tiers)
        scores = run.table("scores", ["doc_id", "status"]).to_pylist()
        assert sum(row["status"] == "nonfinite" for row in scores) == 4
        assert len(run.plan["corpus"]["shards"]) > 2
        examples = list(run.distillation(tier, vocab_size=9))
        assert [e["doc_id"] for e in examples] == [
            row["doc_id"] for row in scores if row["status"] == "ok"
        ]
        for example in examples:
            assert example["input_ids"].tolist() == [0, *good[:-1]]
            assert torch.isfinite(example["logprobs" if tier == "logits" else "states"]).all()
        assert verify_run(run) == []


def test_pieces_that_wait_in_a_buffer_hold_their_own_rows_alone(made: Any) -> None:
    dataset = made["hidden"].distillation("hidden", vocab_size=V, context=5, shuffle_buffer=4)
    for example in dataset:
        states = example["states"]
        assert states.untyped_storage().nbytes() == states.nbytes


def test_workers_read_object_stores(run: Run, s3: str) -> None:
    options = {"endpoint_url": s3}
    s3fs.S3FileSystem(**options).put(
        run.uri.removeprefix("file://"), "bucket/distilled/run", recursive=True
    )
    stored = open_run("s3://bucket/distilled/run", storage_options=options)
    loader = DataLoader(
        stored.distillation(vocab_size=V),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=CONTEXT,
    )
    assert sorted(names(loader)) == sorted(names(run.distillation(vocab_size=V)))
