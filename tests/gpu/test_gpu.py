"""The engine on a GPU: transformers' logits, and the same bits in any batch.

Skipped where there is no GPU. The bundled model and random models of awkward shapes are enough:
what is tested is the engine's own arithmetic, not a checkpoint.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline
from logitmill.engine.blocks import Blocks, powers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MODEL = Path(__file__).resolve().parents[2] / "infra/demo/model"


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def folder(request, tmp_path_factory) -> Path:
    """A random checkpoint with grouped heads of 80, or a sliding window and heads of 128."""
    from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

    shape = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 5003}
    config = {
        "qwen3": Qwen3Config(**shape, **heads, head_dim=80, max_position_embeddings=1 << 17),
        "mistral": MistralConfig(
            **shape, **heads, head_dim=128, sliding_window=100, max_position_embeddings=1 << 17
        ),
    }[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


def sequences(seed: int = 0) -> list[np.ndarray]:
    """Token ids of lengths from one token to thousands."""
    draw = np.random.default_rng(seed)
    lengths = [1, 2, 17, 64, 65, 127, 128, 500, 513, 1000, 2048, 3001, 500, 500, 64, 1]
    return [draw.integers(0, 4000, n) for n in lengths]


def test_float32_logits_are_those_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    pipe = pipeline(folder, dtype="float32", device="cuda")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    for ids in sequences():
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids)[None].cuda()).logits[0].cpu()
        torch.testing.assert_close(pipe.get_logits(ids), expected, atol=1e-4, rtol=1e-4)


FORMATS = ["none", "fp8", "fp8_block", "int8", "int4", "int4_fp8", "int4_fp8_exact"]


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float16", "none"), ("float32", "none"), *(("bfloat16", name) for name in FORMATS)],
)
def test_a_sequence_keeps_its_bits_in_any_batch(folder, dtype, quantization):
    inputs = sequences()
    settings = {"dtype": dtype, "quantization": quantization, "device": "cuda"}
    pipe = pipeline(folder, **settings)
    alone = [pipe.get_logits(ids) for ids in inputs]
    mixed = np.random.default_rng(1).permutation(len(inputs))
    # Equals side by side, which some kernels may take together.
    by_length = np.argsort([len(ids) for ids in inputs])
    for budget, order in ((512, mixed), (4096, by_length), (10_000, mixed), (32768, by_length)):
        # Neither the tokens of a batch nor the rows of logits at a time decide a number.
        rows_memory = budget * 5003 * 4
        other = pipeline(folder, **settings, max_batch_tokens=budget, logits_memory=rows_memory)
        for i, logits in zip(order, other.get_logits([inputs[i] for i in order]), strict=True):
            assert torch.equal(logits, alone[i]), (budget, len(inputs[i]))


def test_long_sequences_keep_their_bits_beside_others(folder):
    """Whatever an attention's plans are made for."""
    draw = np.random.default_rng(3)
    inputs = [draw.integers(0, 4000, n) for n in (4095, 4096, 4097, 5000, 6143, 700)]
    pipe = pipeline(folder, dtype="bfloat16", device="cuda")
    alone = [pipe.get_logits(ids) for ids in inputs]
    for order in ([5, 4, 3, 2, 1, 0], [3, 5, 0, 1, 4, 2]):
        for i, logits in zip(order, pipe.get_logits([inputs[i] for i in order]), strict=True):
            assert torch.equal(logits, alone[i]), (order, len(inputs[i]))


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "int4"])
def test_a_long_window_keeps_its_bits_in_chunks_of_any_size(folder, quantization):
    """Linear parts go by chunks; attention is over the whole window."""
    ids = np.random.default_rng(4).integers(0, 4000, 70_001)
    settings = {"dtype": "bfloat16", "quantization": quantization, "device": "cuda"}
    expected = None
    chunks = ((32768, 2 << 30), (8192, 64 << 20), (2048, 1 << 30), (512, 16 << 20))
    for rows, logits_memory in chunks:
        pipe = pipeline(folder, **settings, logits_memory=logits_memory)
        pipe._model.blocks = Blocks(powers(rows), pipe._model.blocks._agrees)
        score = next(iter(pipe.score([ids], recipe="rolling", context=len(ids), prefix="none")))
        assert score.record.status == "ok"
        columns = (score.tokens.logprob, score.tokens.entropy, score.tokens.rank)
        expected = expected or columns
        for one, other in zip(expected, columns, strict=True):
            assert np.array_equal(one, other), rows


def test_a_long_window_keeps_to_the_memory_that_was_set(folder):
    """Products of fewer rows make room; where even that is not enough, it is said."""
    ids = np.random.default_rng(4).integers(0, 4000, 70_001)
    whole = {"recipe": "rolling", "context": len(ids), "prefix": "none"}
    settings = {
        "dtype": "bfloat16",
        "device": "cuda",
        "max_batch_tokens": 8192,
        "logits_memory": 16 << 20,
    }

    def load(num_bytes):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        return pipeline(folder, **settings, device_memory=num_bytes), before

    pipe, _ = load(4 << 30)
    arrangement = pipe._model.arrangement
    layers = (4 << 30) - arrangement.batch_bytes
    padded = pipe._model.blocks.pad(len(ids))
    expected = next(iter(pipe.score([ids], **whole))).tokens.logprob
    least = pipe._model.blocks.limit(1).sizes[0]
    del pipe
    for rows in (8192, 2048, least):
        room = layers + arrangement.batches.count_bytes(padded, rows)
        pipe, before = load(room)
        torch.cuda.reset_peak_memory_stats()
        found = next(iter(pipe.score([ids], **whole))).tokens.logprob
        assert torch.cuda.max_memory_allocated() - before <= room, rows
        assert np.array_equal(found, expected), rows
        parts = pipe._model._cut(padded, len(ids))
        most = max(part.stop - part.start for part in parts)
        # Fewer rows are no gain where logits take more than they do.
        assert arrangement.batches.count_bytes(padded, most) == room - layers
        del pipe
    pipe, _ = load(room - (1 << 20))
    with pytest.raises(RuntimeError, match="device_memory: a window of 70,000 tokens takes"):
        list(pipe.score([ids], **whole))


@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, *({"quantization": q} for q in FORMATS)]
)
def test_records_keep_their_bits_in_any_batch(settings):
    one = pipeline(MODEL, device="cuda", max_batch_tokens=1024, **settings)
    many = pipeline(MODEL, device="cuda", max_batch_tokens=65536, **settings)
    alone = [next(iter(one.score(text, top_k=20))) for text in texts()]
    found = many.score(list(reversed(texts())), top_k=20)
    for expected, score in zip(reversed(alone), found, strict=True):
        for name, values in vars(expected.tokens).items():
            assert np.array_equal(values, getattr(score.tokens, name)), name


DIGEST = """
import hashlib, sys
from pathlib import Path
from logitmill.engine import pipeline
pipe = pipeline(sys.argv[1], device="cuda", quantization=sys.argv[2],
                max_batch_tokens=int(sys.argv[3]))
digest = hashlib.sha256()
for score in sorted(pipe.score([Path(p).read_text() for p in sys.argv[4:]]),
                    key=lambda s: s.record.loglikelihood):
    for column in (score.tokens.logprob, score.tokens.entropy, score.tokens.rank):
        digest.update(column.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "int4"])
def test_records_keep_their_bits_in_another_process(quantization):
    files = [str(p) for p in paths()]
    found = set()
    for budget, order in (("1500", files), ("30000", files[::-1])):
        command = [sys.executable, "-c", DIGEST, str(MODEL), quantization, budget, *order]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.add(done.stdout.split()[-1])
    assert len(found) == 1


def paths() -> list[Path]:
    return sorted(Path(torch.__file__).parent.glob("*.py"))[:12]


def texts() -> list[str]:
    return [p.read_text() for p in paths()]


def test_candidates_are_the_largest_logits(folder):
    ids = sequences()[9]
    pipe = pipeline(folder, dtype="bfloat16", device="cuda")
    logits = pipe.get_logits(ids)[:-1]
    tokens = next(iter(pipe.score([ids], prefix="none", top_k=50))).tokens
    expected = torch.log_softmax(logits.double(), -1).sort(dim=1, descending=True, stable=True)
    assert np.array_equal(tokens.top_ids, expected.indices[:, :50].numpy())
    np.testing.assert_allclose(tokens.top_logprobs, expected.values[:, :50], atol=1e-5)
    assert np.array_equal(tokens.top_ids[:, 0], tokens.top1_id)
    assert np.array_equal(tokens.top_logprobs[:, 0], tokens.top1_logprob)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kept_log_probabilities_are_those_of_the_records(folder, dtype):
    # Without a prefix the first token is not scored, and of a single one nothing is.
    inputs = [ids for ids in sequences() if len(ids) > 1]
    pipe = pipeline(folder, dtype="bfloat16", device="cuda", max_batch_tokens=2000)
    kept = {i: [] for i in range(len(inputs))}

    def keep(index, doc_id, first_row, logprobs, logsumexp):
        assert first_row == sum(len(rows) for rows in kept[index])
        kept[index].append(logprobs.copy())

    scores = list(pipe.score(inputs, prefix="none", on_logits=keep, logits_dtype=dtype))
    plain = list(pipe.score(inputs, prefix="none"))
    for score, expected in zip(scores, plain, strict=True):
        rows = np.concatenate(kept[score.index])
        assert rows.dtype == dtype
        tokens = score.tokens
        assert np.array_equal(tokens.logprob, expected.tokens.logprob)
        own = rows[np.arange(len(rows)), tokens.token_id]
        assert np.array_equal(own, tokens.logprob.astype(dtype))


def test_memory_that_runs_out_costs_speed_and_no_bits(folder, caplog):
    draw = np.random.default_rng(5)
    inputs = [draw.integers(0, 4000, n) for n in draw.integers(200, 3000, 60)]
    settings = {"dtype": "bfloat16", "device": "cuda", "logits_memory": 64 << 20}
    expected = list(pipeline(folder, **settings).score(inputs, prefix="none"))
    pipe = pipeline(folder, **settings, max_batch_tokens=65536)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    # Room for the weights and for batches of some thousand tokens.
    room = torch.cuda.memory_reserved() + (300 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        found = list(pipe.score(inputs, prefix="none"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of device memory" in caplog.text
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.tokens.logprob, other.tokens.logprob)


def test_bfloat16_scores_are_near_those_of_a_cpu():
    text = Path(torch.__file__).read_text()
    cpu = next(iter(pipeline(MODEL, device="cpu").score(text))).record
    gpu = next(iter(pipeline(MODEL, dtype="bfloat16", device="cuda").score(text))).record
    exact = next(iter(pipeline(MODEL, dtype="float32", device="cuda").score(text))).record
    assert gpu.loglikelihood == pytest.approx(cpu.loglikelihood, rel=3e-3)
    assert exact.loglikelihood == pytest.approx(cpu.loglikelihood, rel=1e-5)


def test_logits_memory_bounds_what_the_head_takes():
    text = "x = 1\n" * 40_000
    pipe = pipeline(MODEL, dtype="bfloat16", device="cuda", logits_memory=32 << 20)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    record = next(iter(pipe.score(text))).record
    all_logits = record.num_tokens_scored * pipe.vocab_size * 4
    assert torch.cuda.max_memory_allocated() - before < all_logits / 2


def test_calls_that_overlap_keep_their_bits_and_share_the_time(folder):
    """A thread launches behind the last batch of another one, and each waits for its own."""
    pipe = pipeline(folder, device="cuda", max_batch_tokens=2048)
    documents = [[ids for ids in sequences(seed) if len(ids) > 1] for seed in range(4)]
    apart = [list(pipe.score(some, prefix="none")) for some in documents]
    torch.cuda.synchronize()
    pipe.take_device_seconds()
    turn, started = threading.Lock(), time.perf_counter()

    def score(some):
        turn.acquire()
        return list(pipe.score(some, prefix="none", on_launched=turn.release))

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(score, documents))
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    assert 0 < pipe.take_device_seconds() <= seconds
    assert pipe.take_device_seconds() == 0
    for scores, expected in zip(together, apart, strict=True):
        for score, other in zip(scores, expected, strict=True):
            assert score.record == other.record
            for name, column in vars(score.tokens).items():
                assert np.array_equal(column, getattr(other.tokens, name)), name
