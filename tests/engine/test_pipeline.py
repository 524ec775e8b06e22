"""The face of the engine: what may go in, and that the same bits come out however it goes in."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import CONTEXT
from logitmill.engine import Document, Pipeline, pipeline, placement
from logitmill.engine.checkpoint import Checkpoint
from logitmill.engine.pipeline import EngineSettings, inspect_placement, load_pipeline
from logitmill.engine.residency import count_bytes
from oracles import markov_model, reference_logits

# The function has the module's name.
engine_pipeline = sys.modules["logitmill.engine.pipeline"]

IDS = [11, 500, 4095, 7, 7, 3]
OTHER = [9, 8]


def only(logits: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_folder)


# ---- get_logits ------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(demo: Pipeline, demo_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32)
    expected = reference_logits(model, IDS)
    logits = only(demo.get_logits(IDS))
    assert logits.shape == (len(IDS), 4096)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-4


SINGLE: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "int32 array": lambda ids: np.array(ids, np.int32),
    "unsigned array": lambda ids: np.array(ids, np.uint16),
    "tensor": torch.tensor,
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "list of numpy scalars": lambda ids: list(np.array(ids)),
    "list of tensor scalars": lambda ids: list(torch.tensor(ids)),
    "mapping": lambda ids: {"input_ids": ids},
    "mapping with a mask": lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)},
}


@pytest.mark.parametrize("form", SINGLE)
def test_one_sequence_gives_one_tensor(demo: Pipeline, form: str) -> None:
    expected = only(demo.get_logits(IDS))
    assert torch.equal(only(demo.get_logits(SINGLE[form](IDS))), expected)


def padded(side: str) -> tuple[list[list[int]], list[list[int]]]:
    """A batch padded with an id that also occurs in the text, and its mask."""
    gap = len(IDS) - len(OTHER)
    pad, hole = [9] * gap, [0] * gap
    short = OTHER + pad if side == "right" else pad + OTHER
    mask = [1] * len(OTHER) + hole if side == "right" else hole + [1] * len(OTHER)
    return [IDS, short], [[1] * len(IDS), mask]


def padded_mapping(side: str, kind: Callable[[Any], Any]) -> dict[str, Any]:
    ids, mask = padded(side)
    return {"input_ids": kind(ids), "attention_mask": kind(mask)}


BATCH: dict[str, Callable[[], Any]] = {
    "lists": lambda: [IDS, OTHER],
    "arrays": lambda: [np.array(IDS), np.array(OTHER)],
    "tensors": lambda: [torch.tensor(IDS), torch.tensor(OTHER)],
    "mapping": lambda: {"input_ids": [IDS, OTHER]},
    **{
        f"padded on the {side}, {kind.__name__}": partial(padded_mapping, side, kind)
        for side in ("left", "right")
        for kind in (list, np.array, torch.tensor)
    },
}


@pytest.mark.parametrize("form", BATCH)
def test_a_batch_gives_a_list_that_is_never_padded(demo: Pipeline, form: str) -> None:
    """evaluate#636, transformers#9173: elsewhere the side of the padding changes a score."""
    expected = [demo.get_logits(IDS), demo.get_logits(OTHER)]
    found = demo.get_logits(BATCH[form]())
    assert isinstance(found, list)
    assert [len(rows) for rows in found] == [len(IDS), len(OTHER)]
    assert all(map(torch.equal, found, expected))


def test_a_batch_of_one_is_a_batch(demo: Pipeline) -> None:
    for form in ([IDS], torch.tensor([IDS]), np.array([IDS]), {"input_ids": torch.tensor([IDS])}):
        found = demo.get_logits(form)
        assert isinstance(found, list)
        assert torch.equal(found[0], only(demo.get_logits(IDS)))


def test_the_example_people_know(demo: Pipeline, tokenizer: Any) -> None:
    """LMDeploy's: input_ids = tokenizer.apply_chat_template(messages); pipe.get_logits(input_ids).

    transformers 5 returns a mapping where LMDeploy's users had a list.
    """
    messages = [{"role": "user", "content": "sort a list"}]
    input_ids = tokenizer.apply_chat_template(messages)
    listed = tokenizer.apply_chat_template(messages, return_dict=False)
    assert not isinstance(input_ids, list)
    logits = only(demo.get_logits(input_ids))
    assert logits.shape == (len(listed), 4096)
    assert torch.equal(logits, only(demo.get_logits(listed)))
    assert demo.get_ppl(input_ids) == demo.get_ppl(listed)


def test_a_padded_batch_of_chats(demo: Pipeline, tokenizer: Any) -> None:
    chats = [
        [{"role": "user", "content": "sort a list"}],
        [{"role": "user", "content": "sort a list of tuples by their second entry, stable"}],
    ]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt")
    found = demo.get_logits(batch)
    expected = [demo.get_logits(tokenizer.apply_chat_template(chat)) for chat in chats]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_of_the_result(demo: Pipeline, dtype: str) -> None:
    logits = only(demo.get_logits(IDS, dtype=dtype))
    assert logits.dtype == getattr(torch, dtype)
    assert torch.equal(logits, only(demo.get_logits(IDS)).to(logits.dtype))


@pytest.mark.parametrize(
    ("input_ids", "said"),
    [
        ([], "input_ids: sequence 0 is empty"),
        ([[1, 2], []], "input_ids: sequence 1 is empty"),
        ([1, 4096], "4096 at position 1 of sequence 0 is not in the model's vocabulary of 4096"),
        ([[1], [2, -1]], "-1 at position 1 of sequence 1"),
        ([1.5, 2.5], "sequence 0 is not a flat list of integers"),
        ([[[1, 2]]], "sequence 0 is not a flat list of integers"),
        ("text", "input_ids"),
        (["text"], "input_ids"),
        ({"attention_mask": [1]}, "input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "sequence 0 is empty"),
        (7, "input_ids"),
        (None, "input_ids"),
    ],
)
def test_wrong_ids_are_errors_that_name_the_place(
    demo: Pipeline, input_ids: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        demo.get_logits(input_ids)


def test_wrong_dtype_is_named(demo: Pipeline) -> None:
    with pytest.raises(ValueError, match="dtype: 'int8' is not one of float32"):
        demo.get_logits(IDS, dtype="int8")


def test_a_cpu_starts_no_cuda(demo: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU as well, which may be another process's alone."""

    def start() -> int:
        raise RuntimeError("CUDA is started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", start)
    demo.get_logits(IDS)


@pytest.mark.parametrize("which", [0, 1])
def test_a_result_that_cannot_be_written_is_an_error(
    which: int, demo: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the thread that writes results: also of the last one, which nothing comes after."""
    copies = iter(range(2))

    def copy(chunk: Any, results: Any) -> None:
        if next(copies) == which:
            raise MemoryError("no room")

    monkeypatch.setattr(engine_pipeline, "_copy", copy)
    with pytest.raises(MemoryError, match="no room"):
        demo.get_logits([[7] * 600, [8] * 300])


# ---- get_ppl ---------------------------------------------------------------------------------


def test_ppl_is_the_exponential_of_the_mean_negative_log_likelihood(demo: Pipeline) -> None:
    rows = only(demo.get_logits(IDS)).double().log_softmax(1)
    nll = -np.mean([rows[t, IDS[t + 1]].item() for t in range(len(IDS) - 1)])
    ppl = demo.get_ppl(IDS)
    assert ppl == pytest.approx(math.exp(nll), rel=1e-5)
    assert demo.get_ppl([IDS, OTHER]) == [ppl, demo.get_ppl(OTHER)]
    (score,) = demo.score([IDS], prefix="none")
    assert score.record.token_perplexity == pytest.approx(ppl, rel=1e-9)


def test_ppl_of_one_token_is_refused(demo: Pipeline) -> None:
    with pytest.raises(ValueError, match="sequence 1 has 1 token, perplexity needs 2"):
        demo.get_ppl([IDS, [5]])


def test_ppl_beyond_float64_is_infinite(tmp_path: Path) -> None:
    from oracles import table_model

    pipe = pipeline(table_model(tmp_path, 5000.0 * np.eye(9)), device="cpu")
    assert pipe.get_ppl([1, 2, 3]) == math.inf


# ---- score -----------------------------------------------------------------------------------


def test_inputs_may_be_mixed_and_come_back_in_order(demo: Pipeline, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "sort a list"}]
    text = "import os\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    inputs = [text, ids, np.array(ids), torch.tensor(ids), chat, Document("mine", text=text)]
    found = list(demo.score(inputs))
    assert [s.index for s in found] == list(range(6))
    assert [s.record.doc_id for s in found] == ["0", "1", "2", "3", "4", "mine"]
    for i in (1, 2, 3, 5):
        np.testing.assert_array_equal(found[i].tokens.logprob, found[0].tokens.logprob)
    assert found[0].record.num_bytes == len(text)
    assert found[1].record.num_bytes == 0
    assert found[4].text == tokenizer.apply_chat_template(chat, tokenize=False)


def test_a_chat_begins_with_one_bos(demo: Pipeline, tokenizer: Any) -> None:
    (score,) = demo.score([[{"role": "user", "content": "sort a list"}]])
    listed = tokenizer.apply_chat_template(
        [{"role": "user", "content": "sort a list"}], return_dict=False
    )
    assert listed[0] == tokenizer.bos_token_id
    assert score.tokens.token_id.tolist() == listed[1:]
    rows = only(demo.get_logits(listed)).log_softmax(1)
    expected = [rows[t, listed[t + 1]].item() for t in range(len(listed) - 1)]
    np.testing.assert_allclose(score.tokens.logprob, expected, atol=1e-5)


def test_one_text_is_one_document(demo: Pipeline) -> None:
    (score,) = demo.score("import os\n")
    assert score.record.num_chars == 10


def test_scores_come_as_they_are_ready(tmp_path: Path) -> None:
    """A corpus is an iterable that may never end."""
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield [5, 6, 7] * 30

    pipe = pipeline(markov_model(tmp_path, 3), device="cpu", max_batch_tokens=256)
    first = next(iter(pipe.score(endless())))
    assert first.record.num_tokens_scored == 89
    assert taken < 100


def test_an_input_of_another_kind_is_an_error(demo: Pipeline) -> None:
    with pytest.raises(ValueError, match="document 1 is a float"):
        list(demo.score(["text", 1.5]))


def test_a_recipe_beyond_the_model_is_refused(demo: Pipeline) -> None:
    with pytest.raises(ValueError, match="context: 2048 is more than the model's 1024"):
        demo.score(["text"], recipe="disjoint-2048")


def test_narrow_arithmetic_stays_near(demo: Pipeline, demo_folder: Path) -> None:
    narrow = pipeline(demo_folder, device="cpu", dtype="bfloat16")
    text = "def add(a, b):\n    return a + b\n" * 4
    (wide_score,), (narrow_score,) = demo.score([text]), narrow.score([text])
    assert narrow_score.tokens.logprob.dtype == np.float32
    difference = np.abs(narrow_score.tokens.logprob - wide_score.tokens.logprob)
    assert 0 < difference.mean() < 0.05


# ---- the same bits in another process --------------------------------------------------------


def hash_scores(pipe: Connection, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    model = pipeline(folder, device="cpu")
    corpus = [[(7 * i * n) % model.vocab_size for i in range(n)] for n in (3, 64, 65, 700)]
    hash = hashlib.sha256()
    for score in model.score(corpus, prefix=0):
        hash.update(score.tokens.logprob.tobytes() + score.tokens.entropy.tobytes())
    for logits in model.get_logits(corpus):
        hash.update(logits.numpy().tobytes())
    pipe.send((torch.get_num_threads(), hash.hexdigest()))


@pytest.mark.parametrize("model", ["demo", "markov"])
def test_another_process_with_other_threads_gives_the_same_bits(
    model: str, demo_folder: Path, tmp_path: Path
) -> None:
    folder = demo_folder if model == "demo" else markov_model(tmp_path, 5)
    found: dict[int, str] = {}
    for threads in (1, 2):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=hash_scores, args=(theirs, folder, threads), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(120), "nothing is said"
        count, found[threads] = ours.recv()
        assert count == threads
        process.join()
    assert found[1] == found[2]


# ---- residency -------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGITMILL_SCRATCH", str(tmp_path))
    return tmp_path


def test_layers_on_disk_give_the_bits_of_resident_ones(
    demo: Pipeline, demo_folder: Path, scratch: Path
) -> None:
    pipe = pipeline(demo_folder, device="cpu", residency="disk")
    for ids in (IDS, OTHER, IDS * 100):
        assert torch.equal(only(pipe.get_logits(ids)), only(demo.get_logits(ids)))
    assert f"read from disk for every batch (0.01 GB in {scratch}; at " in pipe.placement
    assert " s a batch of 8,192 tokens), 2 at a time of 0.00 GB: as asked for" in pipe.placement
    assert demo.placement.startswith("all ")
    assert [*scratch.iterdir()] == []


def test_layers_that_do_not_fit_a_cpus_memory_are_on_disk_and_it_is_said(
    demo: Pipeline,
    demo_folder: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Nothing but weights, so that a few bytes decide.
    monkeypatch.setattr(placement.Batches, "count_bytes", lambda *_: 0)
    held = demo._model._layers.held  # type: ignore[attr-defined]
    sizes = [count_bytes(layer) for layer in held]
    fixed = count_bytes(
        (demo._model._embedding_VD, demo._model._positions_PD, demo._model._head)  # type: ignore[attr-defined]
    )

    def load(free: int, residency: str | None = None) -> Pipeline:
        monkeypatch.setattr(engine_pipeline, "_FREE_SHARE", 1)
        monkeypatch.setattr(engine_pipeline, "free_host_memory", lambda: free)
        return pipeline(demo_folder, device="cpu", residency=residency)

    assert load(fixed + sum(sizes)).placement.startswith("all ")
    assert not caplog.records
    pipe = load(fixed + sum(sizes) - 1)
    assert f"read from disk for every batch (0.00 GB in {scratch}" in pipe.placement
    assert pipe.placement in caplog.messages
    assert torch.equal(only(pipe.get_logits(IDS)), only(demo.get_logits(IDS)))
    for residency in ("device", "host"):
        with pytest.raises(ValueError, match=r"^residency: 'device' takes .*, and host_memory is"):
            load(fixed + sum(sizes) - 1, residency)


def test_a_disk_that_is_too_small_is_found_before_a_weight_is_read(
    demo_folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read

    def watch(self: Checkpoint, name: str, shape: Any, device: torch.device) -> torch.Tensor:
        assert device.type == "meta", f"{name} was read"
        return read(self, name, shape, device)

    monkeypatch.setattr(Checkpoint, "read", watch)
    disk = SimpleNamespace(f_bavail=1000, f_frsize=4096)
    monkeypatch.setattr("logitmill.engine.scratch.os.statvfs", lambda _: disk)
    for look in (load_pipeline, inspect_placement):
        with pytest.raises(ValueError, match=f"^scratch: {scratch} has 0.00 GB free, ") as raised:
            look(demo_folder, EngineSettings(device="cpu", residency="disk"))
        works = "the layers take 0.02 GB; set LOGITMILL_SCRATCH to a folder on a larger disk"
        assert str(raised.value).endswith(works)


def test_memory_of_a_gpu_is_none_of_a_cpu(demo_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^device_memory: 24.0 GB is of a GPU's memory, and devi"):
        pipeline(demo_folder, device="cpu", device_memory=24 * 10**9)


@pytest.mark.parametrize("name", ["max_batch_tokens", "logits_memory", "device_memory"])
@pytest.mark.parametrize("value", [0, -1])
def test_nothing_is_no_amount(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: {value} is not at least 1"):
        engine_pipeline.EngineSettings(**{name: value})
