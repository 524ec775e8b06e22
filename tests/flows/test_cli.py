"""The `logitmill` command: what it says, where, and with which exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from flow_helpers import Score
from forks import CONTEXT
from logitmill.flows import CorpusSpec, Run, cli, open_run, progress
from logitmill.flows.commands.mistakes import name_options
from logitmill.flows.commands.words import show_outliers
from logitmill.flows.folder import Folder


def logitmill(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "logitmill.flows.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **environment},
    )


def run_command(
    arguments: list[str], server_url: str, out: str, err: str, environment: dict[str, str]
) -> None:
    """The command in a process of its own, with what it says in files or on a terminal."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), number)
    os.environ |= {"TERM": "xterm", "COLUMNS": "120", **environment}
    sys.argv = ["logitmill", *arguments]
    with temporary_settings({PREFECT_API_URL: server_url}):
        cli.main()


def start(
    server_url: str, *arguments: Any, out: Any = os.devnull, err: Any = os.devnull, **variables: str
) -> BaseProcess:
    """The command in a forked process, whose imports are done and whose server runs."""
    process = CONTEXT.Process(
        target=run_command,
        args=([*map(str, arguments)], server_url, str(out), str(err), variables),
    )
    process.start()
    return process


Forked = Callable[..., tuple[int | None, str, str]]


@pytest.fixture
def forked(server_url: str, tmp_path: Path) -> Forked:
    """(exit status, stdout, stderr) of the command, run in a forked process."""

    def run(*arguments: Any, **variables: str) -> tuple[int | None, str, str]:
        said = tmp_path / "stdout", tmp_path / "stderr"
        for path in said:
            path.write_text("")
        process = start(server_url, *arguments, out=said[0], err=said[1], **variables)
        process.join(120)
        return process.exitcode, said[0].read_text(), said[1].read_text()

    return run


def in_process(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command, run in this process."""
    before = sys.argv
    sys.argv = ["logitmill", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("command", ["", "score", "follow", "report", "inspect"])
def test_help_teaches(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = in_process(capsys, *command.split(), "--help")
    assert code == 0
    assert f"logitmill {command or 'score'}" in out
    assert "bool" not in out, "a flag takes no value"
    if command == "score":
        for word in (
            "--keep",
            "--out",
            "--recipe",
            "PREFECT_API_URL",
            "AWS_ACCESS_KEY_ID",
            "LOGITMILL_CACHE",
            "exit status is 2",
            "authors you trust",
            "s3://",
            "--workers",
            "dask worker tcp://HOST:8786",
            "CUDA_VISIBLE_DEVICES",
            "--deadline",
            "--only-new",
            "--dry-run",
        ):
            assert word in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['logitmill', '--help']\n"
        "from logitmill.flows import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'prefect', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started[1] < 5


@pytest.mark.parametrize(
    ("command", "late"),
    [
        ("score a b --shard-mb 0", ("torch",)),
        ("score a b --recipe rollin", ("transformers", "prefect")),
        ("score a b --keep topk --top-k 0", ("transformers", "prefect")),
        ("filter runs --keep 60:30", ("torch",)),
        ("publish runs --withdraw --date 2026-11-23", ("torch",)),
        ("ask runs worst_sources --sql", ("torch",)),
        ("inspect runs --doc a --html a.txt", ("torch",)),
    ],
)
def test_a_mistake_is_told_before_the_heavy_imports(command: str, late: tuple[str, ...]) -> None:
    code = (
        f"import sys; sys.argv = ['logitmill', *{command!r}.split()]\n"
        "from logitmill.flows import cli\n"
        "try: cli.main()\n"
        "except SystemExit as ended: assert ended.code == 2\n"
        f"heavy = set({late!r}) & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    # No server: it would be started for nothing.
    nowhere = {**os.environ, "PREFECT_API_URL": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nowhere)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_newcomers_run_from_start_to_report(
    demo_folder: Path, corpus: Path, tmp_path: Path, forked: Forked
) -> None:
    """With nothing set up: an empty home, no server, no terminal."""
    arguments = ["score", demo_folder, corpus, "--out", tmp_path / "runs", "--keep", "tokens"]
    first = logitmill(*arguments, PREFECT_HOME=str(tmp_path / "home"))
    assert first.returncode == 0, first.stderr
    run = open_run(str(tmp_path / "runs"))
    for words in ("8 documents", run.uri, f"{run.uri}/report.html", "bits/byte", "first score"):
        assert words in first.stdout
    # Nothing of Prefect's own, nothing but this package's lines.
    lines = first.stderr.splitlines()
    assert [line for line in lines if not line.startswith((run.uri, "scoring"))] == []
    code, out, err = forked(*arguments)
    assert (code, err) == (0, "")
    assert "scored now: nothing, the run was complete" in out


def test_nobody_who_reads_is_no_failure() -> None:
    code = """
import typer
from logitmill.flows.commands.mistakes import or_exit
try:
    or_exit(lambda: print("line\\n" * 50_000))
except typer.Exit as ended:
    raise SystemExit(ended.exit_code)
"""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_mistake_is_one_line_and_status_2(
    demo_folder: Path, corpus: Path, tmp_path: Path, forked: Forked
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code, out, err = forked("score", demo_folder, corpus, "--out", file / "runs")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: --out: '{file}/runs' cannot be written:")


def test_each_mistake_names_its_field(
    demo_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ("score", demo_folder, corpus, "--out", tmp_path / "runs")
    cases = [
        (("--keep", "everything"), "'--keep': 'everything' is not one of 'tokens', 'topk', "),
        (("--dtype", "int3"), "--dtype: 'int3' is not one of float32"),
        (("--device", "abacus"), "--device: 'abacus'"),
        (("--device", "cuda"), "--device: 'cuda' is not there"),
        (("--quantization", "fp7"), "--quantization: 'fp7' is not one of none, fp8, fp8_block"),
        (("--recipe", "rolling-x"), "--recipe: 'rolling-x' is not one of"),
        (("--context", "5000"), "--context: 5000 is more than"),
        (("--stride", "5"), "--stride: 5 has no meaning for recipe rolling"),
        (("--limit", "-3"), "--limit=-3: a whole number from 1 on; left out, all count"),
        (("--limit", "1k"), "'--limit': '1k' is not a whole number of documents; give 1000"),
        (("--context", "1.5"), "'--context': '1.5' is not a whole number of tokens; give 1024"),
        (("--shard-mb", "8MB"), "'--shard-mb': '8MB' is not a number of MB; give 8"),
        (("--device-memory", "24GB"), "'--device-memory': '24GB' is not a number of GB; give 24"),
        (("--batch-tokens", "0"), "--batch-tokens: 0"),
        (("--logits-memory-mb", "0"), "--logits-memory-mb: 0 MB is no size"),
        (
            ("--logits-memory-mb", "1"),
            "--logits-memory-mb: 1 MB is less than the 3 MB that 64 rows",
        ),
        (("--device-memory", "-2"), "--device-memory: -2 GB is no size"),
        (("--device-memory", "nan"), "--device-memory: nan GB is no size"),
        (("--max-logits-gb", "inf"), "--max-logits-gb: inf GB is no size"),
        (("--device-memory", "24"), "--device-memory: 24.0 GB is of a GPU's memory"),
        (("--shard-mb", "0"), "--shard-mb: 0 MB is no size"),
        (("--text-column", "nope"), "--text-column='nope'"),
        (("--context-column", "q"), "--context-column: 'q' is not read"),
        (("--split", "test"), "--split='test' is for Hugging Face datasets, but CORPUS="),
        (("--ids-column", "i", "--messages-column", "m"), "--messages-column='m' and --ids-col"),
        (
            ("--max-logits-gb", "0", "--keep", "logits"),
            "--max-logits-gb: 0 GB is less than the 0.0",
        ),
        (("--workers", "many"), "--workers: 'many' is neither 'gpus', nor a number of processes"),
        (("--deadline", "0"), "--deadline: 0"),
        (("--deadline", "1h"), "'--deadline': '1h' is not a number of seconds; give 900"),
        (("--price-per-gb-month", "2"), "--price-per-gb-month: 2 is for --dry-run; add that"),
        (("--nonsense",), "No such option: --nonsense"),
    ]
    for arguments, expected in cases:
        code, out, err = in_process(capsys, *good, *arguments)
        assert (code, out) == (2, ""), arguments
        (line,) = err.splitlines()
        assert line.startswith("error: ") and expected in line, (arguments, line)
    code, _, err = in_process(capsys, "score", demo_folder)
    assert code == 2 and "Missing argument 'corpus'" in err and "--help" in err
    code, _, err = in_process(capsys, "score", tmp_path / "none", corpus)
    assert code == 2 and err.startswith("error: MODEL: there is no folder")
    code, _, err = in_process(capsys, "score", corpus, demo_folder)
    assert code == 2 and f"'{demo_folder}' is one; the model comes first" in err


def test_fields_are_named_as_options_but_not_what_is_quoted() -> None:
    said = {
        "split='a uri=b' is wrong, but uri='s3://limit=3' is not; say format='text' instead.": (
            "--split='a uri=b' is wrong, but CORPUS='s3://limit=3' is not; say --format='text' "
            "instead."
        ),
        "max_logits_bytes: 3 is less; score fewer documents (limit), or leave id_column out": (
            "--max-logits-gb: 3 is less; score fewer documents (--limit), or leave --id-column out"
        ),
        "trust_remote_code: x brings code; pass trust_remote_code=True": (
            "--trust-remote-code: x brings code; pass --trust-remote-code"
        ),
        "logits_memory: 1572864 bytes is less than the 'x 3 bytes'": (
            "--logits-memory-mb: 1.5 MB is less than the 'x 3 bytes'"
        ),
        "quantization_config: the model's format: 3": "quantization_config: the model's format: 3",
    }
    assert {message: name_options(message) for message in said} == said


def test_shards_that_fail_are_status_1(
    demo_folder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Folder, local: Path, name: str) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "publish", fail)
        code, _, err = in_process(capsys, "score", demo_folder, corpus, "--out", tmp_path / "runs")
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith("error: 1 of 1 shards failed, the first is shard 0: ")
    assert "Input/output error" in line and line.endswith("; run again to do them")
    # Once for each command that this process has run.
    lines = dict.fromkeys(err.splitlines())
    told = [line for line in lines if line.startswith("shard 0: ")]
    ends = ["; attempt 2 follows in a moment", "; attempt 3 follows in a moment", "output error"]
    assert len(told) == 3 and all(map(str.endswith, told, ends))
    assert "Traceback" not in err


@pytest.fixture
def long_corpus(tmp_path: Path) -> Path:
    """A hundred files of code of 12 KB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    source = Path(json.__file__).with_name("decoder.py").read_text()
    for i in range(100):
        (folder / f"{i}.py").write_text(source)
    return folder


def wait_for_a_shard(runs: Path, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not list(runs.glob("*/shards/*.json")):
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_it_with_what_to_do(
    demo_folder: Path, long_corpus: Path, tmp_path: Path
) -> None:
    """And with it the server that it has started."""
    command = [sys.executable, "-m", "logitmill.flows.cli", "score", str(demo_folder)]
    process = subprocess.Popen(
        [*command, str(long_corpus), "--shard-mb", "0.02", "--out", str(tmp_path / "runs")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_a_shard(tmp_path / "runs", lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to do the rest"
    assert "Traceback" not in said


def test_a_signal_ends_it_with_what_to_do(
    demo_folder: Path, long_corpus: Path, server_url: str, tmp_path: Path
) -> None:
    command = ("score", demo_folder, long_corpus, "--shard-mb", "0.02", "--out", tmp_path / "runs")
    err = tmp_path / "err"
    process = start(server_url, *command, err=err)
    wait_for_a_shard(tmp_path / "runs", process.is_alive)
    process.terminate()
    process.join(60)
    said = err.read_text()
    assert process.exitcode == 143, said
    assert said.splitlines()[-1] == "stopped; run the same command again to do the rest"
    assert "Traceback" not in said


def test_inspect_and_report(
    finished: Run, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = in_process(capsys, "inspect", finished.uri)
    assert code == 0
    for words in (finished.uri, "scores, tokens, logits", "8 documents", "bits/byte"):
        assert words in out
    doc_id = finished.table().column("doc_id")[0].as_py()
    code, out, _ = in_process(capsys, "inspect", finished.uri, "--doc", doc_id)
    assert code == 0 and doc_id in out and "loglikelihood" in out
    code, _, err = in_process(capsys, "inspect", finished.uri, "--doc", "nobody")
    assert code == 2 and err.startswith("error: doc_id: 'nobody' is not in the run")
    code, out, _ = in_process(capsys, "inspect", demo_folder)
    assert code == 0 and "LlamaForCausalLM" in out and "1024" in out
    assert "unquantized -> float32" in out
    settings = ("--quantization", "fp8", "--fp8-head", "--device", "cpu")
    code, out, _ = in_process(capsys, "inspect", demo_folder, *settings)
    assert code == 0 and "unquantized -> rounded to fp8" in out and "head rounded to fp8" in out
    code, out, _ = in_process(capsys, "inspect", demo_folder, "--dtype", "bfloat16")
    assert code == 0 and "unquantized -> bfloat16" in out
    for line in (
        "runs           native decoder",
        "weights        47 tensors, 0.01 GB in 1 file",
        "placement      all 5 layers resident (0.00 GB)",
        "tokenizer      4,096 ids, BOS 0, EOS 1, a chat template",
    ):
        assert line in out.splitlines()
    code, out, _ = in_process(capsys, "inspect", demo_folder, "--residency", "disk")
    assert code == 0 and "0 of 5 layers resident, 5 read from disk for every batch" in out
    code, _, err = in_process(capsys, "inspect", finished.uri, "--quantization", "fp8")
    assert code == 2 and err.startswith("error: --quantization: ") and "is a run" in err
    code, _, err = in_process(capsys, "inspect", demo_folder, "--device-memory", "0")
    assert code == 2 and err.startswith("error: --device-memory: 0 GB is no size")
    for nothing in (tmp_path, tmp_path / "nothing"):
        code, _, err = in_process(capsys, "inspect", nothing)
        assert code == 2 and len(err.splitlines()) == 1
        assert "a run has a plan.json" in err and "score MODEL CORPUS --out" in err

    code, out, _ = in_process(capsys, "report", finished.uri, "--out", tmp_path / "r.html")
    assert code == 0 and out.strip() == str(tmp_path / "r.html")
    assert finished.plan["run_key"] in (tmp_path / "r.html").read_text()
    (tmp_path / "folder.html").mkdir()
    code, _, err = in_process(capsys, "report", finished.uri, "--out", "s3://r.html")
    assert code == 2 and err.startswith("error: --out: 's3://r.html' names no bucket")
    code, _, err = in_process(capsys, "report", finished.uri, "--base", tmp_path / "nowhere")
    assert code == 2 and err.startswith("error: --base: there is no run in")
    code, _, err = in_process(capsys, "score", demo_folder, "a.py", "--out", "")
    assert (code, err) == (2, "error: --out: '' names no place; give a folder or a URI\n")
    code, _, err = in_process(capsys, "report", tmp_path)
    assert code == 2 and err.startswith(f"error: run: there is no run in '{tmp_path}'")
    for place, said in (
        ("no/r.html", "lies in a folder that is not there"),
        ("r.md", "ends in .html"),
        ("folder.html", "is a folder"),
    ):
        code, _, err = in_process(capsys, "report", finished.uri, "--out", tmp_path / place)
        assert code == 2 and err.startswith(f"error: --out: '{tmp_path / place}' ") and said in err


def test_the_ends_of_a_run_are_listed_once_each(
    score: Score, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where there are few; that others are too short to be listed is said."""
    texts = {f"{i}.txt": f"import number_{i}\n" * 9 for i in range(7)} | {"short.txt": "import re"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    show_outliers(score(CorpusSpec(uri=str(tmp_path))))
    said = capsys.readouterr().out
    assert all(said.count(f"{i}.txt") == 1 for i in range(7))
    assert "short.txt" not in said and "(not among them: 1 document of fewer than 64 bytes" in said


def test_a_run_is_verified(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = in_process(capsys, "inspect", finished.uri, "--verify", "--sample", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"run     {finished.uri}"
    assert lines[2:] == [
        "        scored 3 of 8 documents again: compared bit for bit",
        "        all holds",
    ]
    copy = Path(shutil.copytree(finished.uri, tmp_path / "copy"))
    (copy / "tokens/part-00000.parquet").unlink()
    (copy / "left.over").write_text("x")
    code, out, err = in_process(capsys, "inspect", copy, "--verify", "--sample", "0")
    assert code == 1 and "all holds" not in out
    assert err.splitlines() == [
        "error: tokens/part-00000.parquet: it is missing",
        "error: left.over: nothing names it: 1 bytes left over",
        f"error: 2 findings; {copy} is not what it should be",
    ]
    for arguments, expected in (
        (("--sample", "3"), "--sample: 3 goes with --verify"),
        (("--verify", "--sample", "-3"), "--sample: -3 is not a number of documents"),
        (("--verify", "--dtype", "float16"), "--dtype: 'float16' is the plan's to say"),
        (("--verify", "--doc", "one"), "--doc: 'one' does not go with --verify"),
    ):
        code, _, err = in_process(capsys, "inspect", finished.uri, *arguments)
        assert code == 2 and err.startswith(f"error: {expected}"), err


def test_where_and_how_it_runs_is_passed_on(
    demo_folder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from logitmill.flows import request

    asked: list[request.Request] = []

    def refuse(what: request.Request) -> None:
        asked.append(what)
        raise ValueError("enough")

    monkeypatch.setattr(request, "prepare", refuse)
    command = ("score", demo_folder, corpus, "--out", tmp_path)
    in_process(capsys, *command, "--workers", "4", "--deadline", "60", "--only-new")
    in_process(capsys, *command)
    assert [(one.workers, one.deadline, one.only_new) for one in asked] == [
        ("4", 60.0, True),
        (None, 900.0, False),
    ]


def test_only_what_is_new_is_scored(
    demo_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(corpus, tmp_path / "own"))
    command = ("score", demo_folder, own, "--out", tmp_path / "runs", "--only-new")
    assert in_process(capsys, *command)[0] == 0
    code, out, _ = in_process(capsys, *command)
    assert (code, out) == (
        0,
        f"{tmp_path}/runs: its runs hold all of the corpus, there is nothing new to score\n",
    )
    (own / "one/new.py").write_text("def new():\n    return 1\n")
    code, out, _ = in_process(capsys, *command, "--dry-run")
    assert code == 0 and f"corpus  {own}: 1 document, " in out
    code, out, _ = in_process(capsys, *command)
    assert code == 0 and "scored now: 1 document in " in out


def test_a_model_is_inspected_for_a_gpu_that_is_not_here(
    demo_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = ("--device-memory", "24")
    code, out, _ = in_process(capsys, "inspect", demo_folder, *gpu, "--quantization", "fp8")
    assert code == 0
    assert "device         cuda: a Hopper GPU of 24 GB in this machine, which has none" in out
    assert "all 5 layers resident" in out
    code, out, _ = in_process(capsys, "inspect", demo_folder, *gpu, "--residency", "host")
    assert code == 0
    assert "0 of 5 layers resident, 5 streamed from pinned host memory" in out
    code, _, err = in_process(capsys, "inspect", demo_folder, "--device-memory", "0.1")
    assert code == 2
    assert err.startswith("error: --device-memory: 0.10 GB is less than the ")
    code, _, err = in_process(capsys, "inspect", demo_folder, *gpu, "--device", "cpu")
    assert code == 2
    assert "device is 'cpu'; leave it out" in err


def test_what_cannot_be_told_of_a_model_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=97,
        hidden_size=48,
        ffn_dim=64,
        word_embed_proj_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    capsys.readouterr()
    line = "not checked    values of weights, memory, and that no token sees later ones"
    code, out, err = in_process(capsys, "inspect", tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == line
    monkeypatch.setattr("logitmill.engine.fallback.can_check_tensors", lambda: False)
    code, out, _ = in_process(capsys, "inspect", tmp_path)
    assert code == 0
    assert out.splitlines()[-1] == line + "; tensors' names and shapes (pip install accelerate)"


def test_a_model_that_cannot_be_loaded_is_no_model_to_inspect(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(demo_folder, tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = in_process(capsys, "inspect", model)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: MODEL: {file} is not a whole safetensors file: it ends at byte")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "--version")[:2] == (0, f"logitmill {version('logitmill')}\n")


def test_a_server_that_is_set_up_but_not_there_is_one_line(
    demo_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    nobody = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(nobody):
        code, _, err = in_process(capsys, "score", demo_folder, corpus, "--out", tmp_path)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_python_callers_need_nothing_set_up(
    demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Also where an event loop runs already, as in a notebook, and Prefect was imported before."""
    code = f"""
import asyncio, prefect
from logitmill.flows import open_run, score_corpus
async def cell():
    return score_corpus(model={str(demo_folder)!r}, corpus={str(corpus)!r}, out={str(tmp_path)!r})
print(open_run(asyncio.run(cell())).table().num_rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert done.stderr == ""


# ---- progress


def test_progress_is_lines_without_a_terminal(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress._Lines.__init__, "__defaults__", (0.01,))
    score(corpus)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("scoring")]
    assert lines and all("document" in line and "tokens/s" in line for line in lines)


def test_progress_is_a_bar_on_a_terminal(
    demo_folder: Path, corpus: Path, server_url: str, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    command = ("score", demo_folder, corpus, "--out", tmp_path)
    process = start(server_url, *command, err=os.ttyname(theirs))
    said = b""
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            said += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert process.exitcode == 0
    assert b"scoring" in said and "\u2501".encode() in said and b"documents" in said


def test_progress_counts_what_was_done_before(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CorpusSpec(uri=str(corpus), shard_bytes=3_000)
    run = Path(score(spec).uri)
    (run / "manifest.json").unlink()
    (run / "shards/00001.json").unlink()
    seen: list[progress.Seen] = []
    monkeypatch.setattr(progress._Artifact, "show", lambda self, what: seen.append(what))
    score(spec)
    assert (seen[-1].documents, seen[-1].fraction) == (8, 1.0)
    assert "  8 documents  " in str(seen[-1])


def test_a_failed_attempt_is_not_counted() -> None:
    tally = progress.Tally()
    with tally.attempt("first") as attempt:
        attempt.add_batch(3, 10, 0.5)
        attempt.add_document(scored=True)

    def fail() -> None:
        with tally.attempt("second") as attempt:
            attempt.add_batch(2, 5, 0.25)
            attempt.add_document(scored=True)
            assert tally.total().documents == 2
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert tally.total() == progress.Count(documents=1, bytes=10, tokens=3, device_seconds=0.5)


def test_how_busy_devices_were_is_told_from_the_last_while() -> None:
    recent = progress._Recent(30.0)
    assert recent.share(5.0, 0.0, 2) is None, "no batch is done"
    assert recent.share(10.0, 1.0, 2) is None, "a first look tells nothing"
    assert recent.share(20.0, 11.0, 2) == 0.5
    # An hour of work, and then a worker that waits.
    for second in range(20, 3620):
        recent.share(second, second - 9.0, 1)
    assert recent.share(3635.0, 3610.0, 1) == pytest.approx(15 / 30, abs=0.03)
    # A lost shard takes its seconds with it, and batches end in bursts.
    assert recent.share(3636.0, 3000.0, 1) == 0.0
    assert recent.share(3637.0, 9000.0, 1) == 1.0


def test_plan_json_holds_no_absolute_input(finished: Run, corpus: Path) -> None:
    plan = json.loads(Path(finished.uri, "plan.json").read_text())
    assert plan["corpus"]["inputs"][0]["uri"] == "one/file0.py"
    assert str(corpus) not in json.dumps(plan["corpus"])


def test_a_run_on_a_server_of_ones_own_is_written_and_read(
    demo_folder: Path, corpus: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = ("--endpoint-url", s3)
    out_uri = "s3://bucket/from-the-command"
    arguments = (demo_folder, corpus, "--keep", "tokens", "--out", out_uri)
    code, out, err = in_process(capsys, "score", *arguments, *endpoint)
    assert code == 0, err
    (uri,) = re.findall(rf"^run: +({out_uri}/\w+)$", out, re.MULTILINE)
    code, out, _ = in_process(capsys, "inspect", uri, *endpoint)
    assert code == 0
    assert "8 documents" in out
    code, out, _ = in_process(capsys, "report", uri, *endpoint)
    assert code == 0
    assert out.strip() == f"{uri}/report.html"
    for page, command in (
        ("report.html", ("report", uri, "--out")),
        ("document.html", ("inspect", uri, "--doc", "one/file0.py", "--html")),
    ):
        place = f"s3://bucket/pages/{page}"
        code, out, err = in_process(capsys, *command, place, *endpoint)
        assert (code, out.strip()) == (0, place), err
        written = Folder("s3://bucket/pages", {"endpoint_url": s3}).read(page)
        assert written is not None and written.startswith(b"<!doctype html>")
    for command in (("report", uri, "--out"), ("inspect", uri, "--doc", "a", "--html")):
        code, _, err = in_process(capsys, *command, "s3://nothing/x.html", *endpoint)
        assert code == 2 and "'s3://nothing' cannot be written" in err


def test_a_model_on_a_server_is_inspected_by_headers_and_fetched_to_score(
    demo_folder: Path, corpus: Path, s3: str, tmp_path: Path, forked: Forked
) -> None:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=s3).put(f"{demo_folder}/", "bucket/demo/", recursive=True)
    uri, cache = "s3://bucket/demo", str(tmp_path / "cache")
    done = logitmill("inspect", uri, "--endpoint-url", s3, LOGITMILL_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout and "all 5 layers resident" in done.stdout
    assert re.fullmatch(
        rf"model: fetching 5 files, 0.00 GB and headers of weights, of {uri} into {cache}/\S+\n",
        done.stderr,
    )
    arguments = ("score", uri, corpus, "--out", tmp_path / "runs", "--endpoint-url", s3)
    code, _, err = forked(*arguments, LOGITMILL_CACHE=cache)
    assert code == 0, err
    line = rf"^model: fetching 5 files, 0.01 GB, of {uri} into {cache}/\S+$"
    assert re.search(line, err, re.MULTILINE)


def test_the_plan_says_what_runs_and_that_others_have_run(
    demo_folder: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from logitmill.flows import request

    arguments = ("score", demo_folder, corpus, "--out", tmp_path, "--limit", "2")
    settings = ("--recipe", "truncated-32", "--quantization", "int8", "--fp8-head")
    code, out, _ = in_process(capsys, *arguments, *settings)
    assert code == 0 and "note" not in out
    (line,) = re.findall("^linears (.*)$", out, re.MULTILINE)
    assert line.startswith("unquantized -> rounded to int8") and "head rounded to fp8" in line
    table = open_run(str(tmp_path)).table()
    mean = sum(table["token_perplexity"].to_pylist()) / 2
    assert f"(token-weighted), {mean:.3f} (mean of documents)" in out
    monkeypatch.setattr(request, "name_device", lambda device: "Abacus")
    code, out, _ = in_process(capsys, *arguments, *settings)
    assert code == 0
    (line,) = re.findall("^note    (.*)$", out, re.MULTILINE)
    assert line.startswith(str(tmp_path)) and "not Abacus; last bits can differ" in line


def test_what_is_kept_is_announced_once(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.py").write_text("def f():\n    return 1\n")
    code, out, err = in_process(
        *(capsys, "score", demo_folder, tmp_path / "one.py"),
        *("--keep", "logits", "--out", tmp_path / "runs"),
    )
    assert code == 0
    assert (out + err).count("logits") == 1
    assert "1 document, 22 B, 1 shard" in out
    assert re.search("^scored now: 1 document in ", out, re.MULTILINE)
    assert re.search("^1 document, [0-9]+ tokens, ", out, re.MULTILINE)


def test_a_bucket_that_is_missing_is_said_once(
    demo_folder: Path, corpus: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--out", "s3://nowhere/runs", "--endpoint-url", s3)
    code, _, err = in_process(capsys, "score", demo_folder, corpus, *place)
    assert (code, err) == (
        2,
        "error: --out: 's3://nowhere/runs' cannot be written: The specified bucket does not exist; "
        "create it first\n",
    )


def test_inspect_says_how_far_a_run_is(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(finished.uri, tmp_path / "my runs" / "copy"))
    (copy / "manifest.json").unlink()
    (copy / "shards/00001.json").unlink()
    count = len(finished.plan["corpus"]["shards"])
    code, out, _ = in_process(capsys, "inspect", copy)
    assert code == 0
    assert out.splitlines()[-1] == (
        f"not complete: {count - 1} of {count} shards done; logitmill score "
        f"{finished.plan['model']['name']} {finished.plan['uri']} --out '{tmp_path}/my runs', with "
        "the options it was begun with, does the rest"
    )


def test_documents_that_failed_are_named(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "good.txt").write_text("def f():\n    return 1\n")
    (tmp_path / "corpus" / "empty.txt").write_text("")
    code, out, _ = in_process(
        capsys, "score", demo_folder, tmp_path / "corpus", "--out", tmp_path / "runs"
    )
    assert code == 0
    assert "empty.txt: empty, " in out


def test_a_run_without_a_single_score_is_status_1(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every time it is asked for, though the run stands: nobody wants such a corpus."""
    (tmp_path / "corpus").mkdir()
    for name in ("one", "two"):
        (tmp_path / "corpus" / f"{name}.txt").write_text("")
    for _ in range(2):
        code, out, err = in_process(
            capsys, "score", demo_folder, tmp_path / "corpus", "--out", tmp_path / "runs"
        )
        assert code == 1
        assert "2 documents, 0 tokens, 0 bytes; 2 could not be scored:" in out
        assert "one.txt: empty, " in out
        assert err.splitlines()[-1] == "error: none of 2 documents could be scored"
    assert open_run(str(tmp_path / "runs")).table().num_rows == 2
