"""What `logitmill bench` counts, runs, writes down and refuses, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from logitmill.engine.pipeline import EngineSettings
from logitmill.engine.spec import DecoderSpec
from logitmill.flows import cli
from logitmill.flows.bench import Request, make_cases, measure
from logitmill.flows.bench.breakdown import Launch, find_part, sum_up
from logitmill.flows.bench.ceilings import Ceiling, Ceilings
from logitmill.flows.bench.costs import Cost, attention_flops, count_costs
from logitmill.flows.bench.peers import PEERS, TransformersLoop
from logitmill.flows.bench.record import Record, load_records
from logitmill.flows.bench.start import process_age
from logitmill.flows.bench.subject import Window, find_subject, windows
from logitmill.flows.workloads import WORKLOADS

BENCHMARKS = Path(__file__).parents[2] / "infra" / "benchmarks"


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings are not what is tested."""
    from logitmill.flows.bench import ceilings

    monkeypatch.setattr(ceilings, "_SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "_HEAD_ROWS", {"cpu": 16})
    monkeypatch.setattr(ceilings, "_LONG", 64)


def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Status, output and errors of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["logitmill", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def make_request(target: str = "demo-mixed", **fields: Any) -> Request:
    """A short measurement on a CPU."""
    cases = (EngineSettings(device="cpu", max_batch_tokens=512),)
    return Request(**{"target": target, "cases": cases, "repeat": 1, "limit": 2, **fields})


# ---- the command -----------------------------------------------------------------------------


def test_a_workload_in_several_formats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "records.jsonl"
    options = ["--device", "cpu", "--limit", 3, "--repeat", 1, "--batch-tokens", 512]
    formats = ["--quantization", "fp8+head", "--quantization", "int8"]
    tiers = [x for tier in ("sampled", "vocabulary", "hidden", "logits") for x in ("--keep", tier)]
    kept = ["--top-k", 5, *tiers, "--json", file]
    status, out, err = bench(monkeypatch, capsys, "demo-mixed", *options, *formats, *kept)
    assert status == 0, err
    first, second = load_records(file)
    tokens = sum(WORKLOADS["demo-mixed"].lengths[:3])
    for record in (first, second):
        assert (record.subject, record.documents, record.tokens) == ("demo-mixed", 3, tokens)
        assert record.batch_tokens == 512
        # What is typed to do it again leaves the file out.
        assert record.command.endswith(" ".join(["--top-k 5", *tiers]))
        assert record.command.startswith("logitmill bench demo-mixed --device cpu")
        assert {"torch", "transformers", "Python"} <= set(record.versions)
        for p in record.passes:
            assert p.tokens_per_second == pytest.approx(tokens / p.seconds)
            assert p.tflops and p.roofline_share and p.peak_bytes is None
        least = math.fsum(part.least or 0.0 for part in record.parts.values())
        rate = 1e6 / least
        share = record.passes[0].roofline_share
        assert share == pytest.approx(record.passes[0].tokens_per_second / rate)
    assert (first.case, second.case) == ("fp8+head", "int8")
    assert "head rounded to fp8" in first.format and "int8" in second.format
    # All that was asked for is measured with the first format alone.
    assert [p.name for p in first.passes] == [
        "records",
        "records, top 5",
        "records, 12 draws",
        "records, vocabulary",
        "hidden states handed over",
        "log-probs handed over, float16",
        "get_logits, float16",
    ]
    assert [p.name for p in second.passes] == ["records"]
    assert list(first.start) == ["imported", "loaded", "first batch done"]
    assert list(first.start.values()) == sorted(first.start.values())
    assert second.start == {}
    bits = [p.bits_per_token for p in first.passes]
    assert len(set(bits[:-1])) == 1 and bits[-1] is None
    # Random weights know nothing of random tokens.
    assert bits[0] == pytest.approx(math.log2(4096), abs=0.3)
    for words in ("demo-mixed: ", "records, top 5", "roofline", "multiplied in int8", "linears"):
        assert words in out


def test_the_list_of_workloads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = bench(monkeypatch, capsys, "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(WORKLOADS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WORKLOAD|MODEL: missing; --list shows the workloads"),
        (["llama9b"], "CORPUS: missing; give texts to measure 'llama9b' on, or one of"),
        (["demo-mixed", "x.txt"], "CORPUS: 'x.txt' is one too many, demo-mixed brings its own"),
        (["demo-mixed", "--quantization", "fp9"], "--quantization: 'fp9' is not one of none, "),
        # Whatever comes first, nothing is measured before all of them are known.
        (
            ["demo-mixed", "--quantization", "none", "--quantization", "int8+hat"],
            "--quantization: 'int8+hat' is not one of",
        ),
        (["demo-mixed", "--peer", "sglang"], "--peer: 'sglang' is not one of transformers, vllm, "),
        (
            ["demo-mixed", "--peer", "vllm"],
            "--peer: 'vllm' is not installed here; pip install vllm",
        ),
        (["demo-mixed", "--repeat", "0"], "--repeat: 0 is not at least 1"),
        (["demo-mixed", "--limit", "0"], "--limit: 0 is not at least 1"),
        (["demo-mixed", "--fidelity", "--top-k", "5"], "--top-k: it is of speed, and this is of"),
        (["demo-mixed", "--top-k", "0"], "--top-k: 0 is not an integer within 1 ... 256"),
        (["demo-mixed", "--top-k", "257"], "--top-k: 257 is not an integer within 1 ... 256"),
        (["model", "x.txt", "--from-disk"], "--from-disk: 'model' is read from disk anyway"),
    ],
)
def test_a_mistake_names_its_field(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    status, out, err = bench(monkeypatch, capsys, *arguments, "--device", "cpu")
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


def test_states_of_a_model_that_transformers_runs_are_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    demo_folder: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(
        demo_folder, tmp_path / "other", ignore=lambda *_: ["model.safetensors"]
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["OtherForCausalLM"]})
    )
    (tmp_path / "a.txt").write_text("import os")
    told = bench(monkeypatch, capsys, folder, tmp_path / "a.txt", "--keep", "hidden")
    assert told[:2] == (2, "")
    assert "--keep: 'hidden' cannot be measured: transformers runs" in " ".join(told[2].split())


def test_the_page_is_what_its_records_say() -> None:
    spec = importlib.util.spec_from_file_location("render", BENCHMARKS / "render.py")
    assert spec and spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    said = (BENCHMARKS / "README.md").read_text()
    assert said == render.render(), "run infra/benchmarks/render.py"


def test_scripts_name_options_that_exist() -> None:
    import re
    import shlex

    import typer

    command = typer.main.get_command(cli.app).commands["bench"]  # type: ignore[attr-defined]
    for name in ("h200.sh", "fidelity.sh", "stored.sh"):
        text = (BENCHMARKS / name).read_text().replace("\\\n", " ")
        calls = re.findall(r"^(?:bench|\$\{LOGITMILL.*?\} bench) (.*)", text, re.MULTILINE)
        assert calls
        for call in calls:
            arguments = shlex.split(call.partition("||")[0].replace('"$@"', ""))
            command.make_context("bench", arguments)


# ---- cases and subjects ----------------------------------------------------------------------


def test_cases_by_name() -> None:
    plain = EngineSettings(device="cpu", dtype="bfloat16")
    fp8, head, none = make_cases(["fp8", "fp8+head", "none"], plain)
    assert (fp8.quantization, fp8.fp8_head, fp8.dtype) == ("fp8", False, "bfloat16")
    assert (head.quantization, head.fp8_head) == ("fp8", True)
    assert (none.quantization, none.fp8_head) == ("none", False)
    assert make_cases([], plain) == (plain,)


def test_a_checkpoint_from_disk_is_written_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    request = make_request(from_disk=True)
    (one,) = measure(request)
    (folder,) = (tmp_path / "logitmill-workloads").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    (two,) = measure(request)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert one.passes[0].bits_per_token == two.passes[0].bits_per_token


def test_a_model_on_texts_beside_the_usual_loop(demo_folder: Path, tmp_path: Path) -> None:
    source = Path(json.__file__).read_text()
    for i in range(3):
        (tmp_path / f"{i}.py").write_text(source[i * 1000 : i * 1000 + 700])
    (record,) = measure(
        make_request(
            str(demo_folder), corpus=str(tmp_path / "*.py"), limit=None, peers=("transformers",)
        )
    )
    ours, theirs = record.passes
    assert record.documents == 3
    assert theirs.name == "transformers, batches of 8"
    assert theirs.bits_per_token == pytest.approx(ours.bits_per_token, rel=1e-5)


# ---- peers -----------------------------------------------------------------------------------


def stand_in(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


GIVEN = [Window(np.array([5, 6, 7, 8]), 1), Window(np.array([1, 2, 3]), 2)]


def test_vllm_is_asked_for_the_targets_alone(
    monkeypatch: pytest.MonkeyPatch, demo_folder: Path
) -> None:
    made: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            made["engine"] = options

        def generate(self, prompts: list[Any], wanted: Any, *, use_tqdm: bool) -> list[Any]:
            made["prompts"], made["wanted"] = prompts, wanted
            flat = [[-1.0, -2.0, -3.0], [-10.0, -20.0]]
            return [
                types.SimpleNamespace(prompt_logprobs=types.SimpleNamespace(logprobs=row))
                for row in flat
            ]

    module = stand_in("vllm", LLM=LLM, SamplingParams=lambda **o: o, __version__="9.9")
    monkeypatch.setitem(sys.modules, "vllm", module)
    subject = types.SimpleNamespace(folder=lambda: demo_folder, random=True)
    peer = PEERS["vllm"](subject, EngineSettings(quantization="fp8"), "bfloat16", 20000)  # type: ignore[arg-type]
    assert peer.name == "vLLM 9.9, prompt_logprobs=0"
    assert peer.dtype == "fp8"
    # The second window's first target is its third token; its second is context.
    assert peer.score(GIVEN) == -1 - 2 - 3 - 20
    assert made["engine"] == {
        "model": str(demo_folder),
        "dtype": "bfloat16",
        "quantization": "fp8",
        "load_format": "dummy",
        "max_model_len": 20001,
        "max_num_batched_tokens": 20001,
        "enable_prefix_caching": False,
    }
    assert made["prompts"] == [
        {"prompt_token_ids": [5, 6, 7, 8]},
        {"prompt_token_ids": [1, 2, 3]},
    ]
    wanted = {"max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True, "detokenize": False}
    assert made["wanted"] == wanted


def test_lmdeploy_gives_means(monkeypatch: pytest.MonkeyPatch, demo_folder: Path) -> None:
    made: dict[str, Any] = {}

    class Engine:
        def get_ppl(self, sequences: list[list[int]]) -> list[float]:
            made["sequences"] = sequences
            return [2.0, 4.0]

    def pipeline(model: str, *, backend_config: Any) -> Engine:
        made["model"], made["config"] = model, backend_config
        return Engine()

    module = stand_in(
        "lmdeploy", pipeline=pipeline, PytorchEngineConfig=lambda **o: o, __version__="9.9"
    )
    monkeypatch.setitem(sys.modules, "lmdeploy", module)
    subject = types.SimpleNamespace(folder=lambda: demo_folder)
    peer = PEERS["lmdeploy"](subject, EngineSettings(), "bfloat16", 100)  # type: ignore[arg-type]
    assert (peer.name, peer.dtype) == ("LMDeploy 9.9, get_ppl", "bfloat16")
    assert peer.score(GIVEN) == -(2.0 * 3 + 4.0 * 2)
    assert made["model"] == str(demo_folder)
    assert made["sequences"] == [[5, 6, 7, 8], [1, 2, 3]]
    assert made["config"] == {
        "dtype": "bfloat16",
        "session_len": 101,
        "max_prefill_token_num": 16384,
        "enable_prefix_caching": False,
    }


@pytest.mark.slow
def test_texts_from_storage_to_storage(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    s3: str,
    server_url: str,
) -> None:
    file, out = tmp_path / "records.jsonl", tmp_path / "runs"
    stores = ["--store", out, "--store", "s3://bucket/bench", "--endpoint-url", s3]
    options = ["--device", "cpu", "--limit", 3, "--shards", 2, "--repeat", 1, "--json", file]
    # What a worker needs beside that is tested with workers.
    workers = ["--workers", 1] if os.environ.get("LOGITMILL_LONG") else []
    status, said, err = bench(monkeypatch, capsys, "demo-mixed", *options, *stores, *workers)
    assert status == 0, err
    (record,) = load_records(file)
    names = ["records", "file to file", "s3 to s3"]
    assert [p.name for p in record.passes if "worker" not in p.name] == names
    # Cut where tokens begin, but for what a tokenizer makes of the ends.
    wanted = 2 * sum(WORKLOADS["demo-mixed"].lengths[:3])
    assert record.documents == 6 and record.tokens == pytest.approx(wanted, rel=0.02)
    first, *others = record.passes
    for p in others:
        assert p.bits_per_token == pytest.approx(first.bits_per_token, rel=1e-12)
        assert p.busy is not None and 0 < p.busy <= 1
    assert "busy" in said and "as texts, 2 times" in said
    assert not any(out.iterdir())
    assert not fsspec.filesystem("s3", endpoint_url=s3).find("bucket/bench")


def test_the_usual_loop_scores_what_the_engine_scores(demo_folder: Path, tmp_path: Path) -> None:
    """Windows with context among them: a text longer than the model's context."""
    (tmp_path / "long.py").write_text(Path(json.__file__).read_text()[:6000])
    (tmp_path / "short.py").write_text("import json\n")
    subject = find_subject(
        str(demo_folder),
        str(tmp_path / "*.py"),
        text_column="text",
        recipe="rolling-256",
        limit=None,
        from_disk=False,
        shared=True,
    )
    settings = EngineSettings(device="cpu")
    pipe = subject.load(settings)
    given = list(windows(subject, pipe, subject.documents))
    assert max(len(w.ids) for w in given) == 257 and any(w.num_context > 1 for w in given)
    scores = list(pipe.score(subject.documents, recipe=subject.recipe))
    targets = sum(len(w.ids) - w.num_context for w in given)
    assert targets == sum(s.record.num_tokens_scored for s in scores)
    expected = sum(s.record.loglikelihood or 0.0 for s in scores)
    loop = TransformersLoop(subject, settings, "float32", 257)
    assert loop.score(given) == pytest.approx(expected, rel=1e-6)


# ---- arithmetic by hand ----------------------------------------------------------------------


def small_spec(**changes: Any) -> DecoderSpec:
    from logitmill.engine.families import FAMILIES

    config = {**WORKLOADS["demo-mixed"].config, "hidden_size": 8, "intermediate_size": 12}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"head_dim": 4, "vocab_size": 10, **changes}
    return FAMILIES["LlamaForCausalLM"].spec(config)


def test_attention_counts_what_a_token_may_look_at() -> None:
    # 1 + 2 + 3 + 4 + 5 pairs, four operations for each number of the queries.
    assert attention_flops(8, 5, None) == 4 * 8 * 15
    # 1 + 2 + 3 + 3 + 3 pairs.
    assert attention_flops(8, 5, 3) == 4 * 8 * 12
    assert attention_flops(8, 2, 3) == 4 * 8 * 3


def test_costs_of_a_small_model() -> None:
    costs = count_costs(
        small_spec(), [3, 5], shared=[0, 0], scored=8, width=2, input_width=1, head_width=1
    )
    # qkv 8 -> 8 + 4 + 4, output 8 -> 8, gate and up 8 -> 24, down 12 -> 8; two layers, 8 tokens.
    weights = 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12
    assert costs["linears"] == Cost(flops=2 * 8 * 2 * weights)
    assert costs["head"] == Cost(flops=2 * 8 * 8 * 10)
    assert costs["attention"] == Cost(flops=2 * 4 * 8 * (6 + 15))
    # Read the sum and what is added, write the sum in 2 bytes each and the result in 1.
    assert costs["norms"] == Cost(bytes=8 * 2 * 2 * (3 * 8 * 2 + 8))
    assert costs["rotary"] == Cost(bytes=8 * 2 * 2 * (8 + 4) * 2)
    assert costs["gate"] == Cost(bytes=8 * 2 * (2 * 12 * 2 + 12))
    # What attention left, in each layer; and what the head takes, once.
    assert costs["quantize"] == Cost(bytes=8 * 2 * 8 * (2 + 1) + 8 * 8 * (2 + 1))
    assert costs["statistics"] == Cost(bytes=4 * 8 * 10)
    plain = count_costs(
        small_spec(), [8], shared=[0], scored=8, width=2, input_width=2, head_width=2
    )
    assert "quantize" not in plain


def test_what_windows_share_costs_once() -> None:
    sizes = {"width": 2, "input_width": 2, "head_width": 2}
    plain = count_costs(small_spec(), [7], shared=[0], scored=3, **sizes)
    costs = count_costs(small_spec(), [5, 6], shared=[0, 4], scored=3, **sizes)
    for part in ("linears", "head", "norms", "statistics"):
        assert costs[part] == plain[part]
    # The second window's last two tokens look at five and at six.
    assert costs["attention"] == Cost(flops=2 * 4 * 8 * (15 + 5 + 6))


SPARSE = {
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 6, "moe_intermediate_size": 20},
    "DeepseekV3": {
        **{"n_routed_experts": 6, "num_experts_per_tok": 6, "moe_intermediate_size": 20},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
        **{"qk_nope_head_dim": 16, "v_head_dim": 12, "num_key_value_heads": 4},
    },
}


@pytest.mark.parametrize("family", SPARSE)
def test_products_are_those_of_every_weight_that_a_token_meets(family: str) -> None:
    """With all experts chosen: the matrices of transformers' model, but router and tables."""
    import transformers
    from logitmill.engine.families import FAMILIES

    config = getattr(transformers, f"{family}Config")(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        **SPARSE[family],
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    weights = sum(
        weight.numel()
        for name, weight in model.model.layers.named_parameters()
        if weight.ndim > 1 and not name.endswith("mlp.gate.weight")
    )
    spec = FAMILIES[f"{family}ForCausalLM"].spec(config.to_dict())
    costs = count_costs(spec, [7], shared=[0], scored=7, width=2, input_width=2, head_width=2)
    assert costs["linears"] == Cost(flops=2.0 * 7 * weights)


def test_least_times_are_costs_over_ceilings() -> None:
    ceilings = Ceilings(
        linears=Ceiling(100.0, ""),
        head=Ceiling(50.0, ""),
        attention=Ceiling(10.0, ""),
        copy=Ceiling(4.0, ""),
    )
    costs = {"linears": Cost(flops=200.0), "head": Cost(flops=25.0), "norms": Cost(bytes=6.0)}
    assert ceilings.seconds(costs) == {"linears": 2.0, "head": 0.5, "norms": 1.5}
    assert list(ceilings.named()) == ["linears", "head", "attention", "copy"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_qqtst_128x256_h_bz_TNT", "linears"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>(...)", "attention"),
        ("_attend", "attention"),
        ("_add_norm", "norms"),
        ("_quantize_rows", "quantize"),
        ("_row_statistics", "statistics"),
        ("_expand_fp8", "expansion"),
        ("_fp8_blocks", "linears"),
        ("void at::native::elementwise_kernel<4>()", "copies"),
    ],
)
def test_parts_by_the_names_of_kernels(name: str, part: str) -> None:
    assert find_part(name) == part


def test_a_breakdown_by_hand() -> None:
    """Two kernels side by side for 1 us, 2 us of nothing, a product whose rows are summed up."""
    launches = [
        Launch("nvjet", 10.0, 14.0),
        Launch("_add_norm", 13.0, 15.0),
        # Runs beside the arithmetic, and counts for nothing.
        Launch("Memcpy DtoH (Device -> Pinned)", 0.0, 100.0),
        Launch("_row_statistics", 20.0, 21.0),
        Launch("gemm", 17.0, 20.0),
    ]
    found = sum_up(launches)
    assert found.seconds == pytest.approx(11e-6)
    assert found.parts == pytest.approx(
        {"linears": 4e-6, "head": 3e-6, "norms": 2e-6, "idle": 2e-6, "statistics": 1e-6}
    )
    assert next(iter(found.parts)) == "linears"
    assert found.busy == pytest.approx(9 / 11)
    with pytest.raises(RuntimeError, match="no kernel"):
        sum_up([])


def test_a_process_is_older_than_what_it_imported() -> None:
    import time

    before = process_age()
    if before is None:
        pytest.skip("the system does not say")
    time.sleep(0.05)
    after = process_age()
    assert after is not None and 0.03 < after - before < 5


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    (record,) = measure(make_request(), command="logitmill bench demo-mixed")
    assert isinstance(record, Record)
    record.append(tmp_path / "records.jsonl")
    assert load_records(tmp_path / "records.jsonl") == [record]
