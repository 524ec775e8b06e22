"""What the flows' tests share: corpora, small models, and runs scored in this process.

No server is set up: the first call of `score_corpus` in a test process starts the embedded one, as
it would for anybody.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Read when prefect and botocore are imported. Each test process has a server and a home of its own.
HOME = tempfile.mkdtemp(prefix="logitmill-test-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ |= {
    "PREFECT_HOME": HOME,
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL",
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
os.environ.pop("PREFECT_API_URL", None)

from ceph import Ceph  # noqa: E402
from cluster import Cluster  # noqa: E402
from faults import Fault, Whole  # noqa: E402
from flow_helpers import SECRET, Score  # noqa: E402
from logitmill.flows import Run, open_run, score_corpus, shards  # noqa: E402
from logitmill.flows.corpus import CorpusSpec  # noqa: E402

os.environ["AWS_SECRET_ACCESS_KEY"] = SECRET


@pytest.fixture
def count_fault(record_property: Callable[[str, object], None]) -> Callable[[str, Whole], Fault]:
    """A counter for a fault by its name, whose row is in the table at the end."""
    return lambda name, whole: Fault(name, whole, record_property)


@pytest.fixture(scope="session")
def server_url() -> str:
    """Of the server that this process's flow runs go to."""
    from logitmill.flows.server import start_server

    server = start_server()
    assert server is not None
    server.wait()
    return server.api_url


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed tasks are tried again at once."""
    monkeypatch.setattr(
        shards, "score_shard", shards.score_shard.with_options(retry_delay_seconds=0)
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of code of uneven length in two folders, 0.5 to 2 KB."""
    root = tmp_path_factory.mktemp("corpus")
    source = Path(json.__file__).with_name("decoder.py").read_text()
    for i in range(8):
        file = root / ("one", "two")[i % 2] / f"file{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source[i * 400 : i * 400 + 500 + 200 * ((5 * i) % 8)])
    return root


@pytest.fixture
def score(demo_folder: Path, tmp_path: Path) -> Score:
    """Score a corpus with the bundled model, by default into `tmp_path / "runs"`."""

    def run(corpus: Any, **options: Any) -> Run:
        options = {"model": str(demo_folder), "out": str(tmp_path / "runs"), **options}
        uri = score_corpus(corpus=str(corpus) if isinstance(corpus, Path) else corpus, **options)
        endpoint = options.get("endpoint_url")
        where = {"endpoint_url": endpoint} if endpoint and uri.startswith("s3://") else None
        return open_run(uri, storage_options=where)

    return run


@pytest.fixture(scope="session")
def finished(corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of all tiers in several shards. Not to be changed."""
    return open_run(
        score_corpus(
            model=str(demo_folder),
            corpus=CorpusSpec(uri=str(corpus), shard_bytes=3_000),
            out=str(tmp_path_factory.mktemp("finished")),
            tiers=["tokens", "logits"],
        )
    )


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> CorpusSpec:
    """Twelve shards of six files each, and the sixth of a single long one.

    Each is half a second's work, or more. A file of the third begins with "# POISON".
    """
    folder = tmp_path_factory.mktemp("modules")
    text = Path(random.__file__).read_text() * 6
    for i in range(12):
        shard, size = text[i * 9000 : (i + 1) * 9000], 9000 if i == 5 else 1500
        for j in range(0, 9000, size):
            (folder / f"{i:02}-{j:04}.py").write_text(shard[j : j + size])
    (folder / "02-3000.py").write_text("# POISON\n" + text[: 1500 - len("# POISON\n")])
    return CorpusSpec(uri=str(folder), shard_bytes=9_000)


@pytest.fixture(scope="session")
def whole(
    modules: CorpusSpec, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    """What a run of `modules` holds that one process made and nobody disturbed."""
    out = str(tmp_path_factory.mktemp("whole"))
    return Whole.of(open_run(score_corpus(str(demo_folder), modules, out, tiers=["tokens"])))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers, with the keys of Ceph's gateway."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for _ in range(2):
            made.start_worker(AWS_ACCESS_KEY_ID=Ceph.key, AWS_SECRET_ACCESS_KEY=Ceph.secret)
        yield made
    finally:
        made.close()


def save_model(folder: Path, *, vocab_size: int, context: int = 64, seed: int = 0) -> Path:
    """A random Llama of one small layer, without tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without tokenizer; vocabulary of 32."""
    return save_model(tmp_path_factory.mktemp("models") / "bare", vocab_size=32)


@pytest.fixture(scope="session")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are words: w3 ... w31."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save_model(tmp_path_factory.mktemp("models") / "words", vocab_size=32, context=2048)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 32)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def broken_model(demo_folder: Path, tmp_path: Path) -> Path:
    """The bundled model with one NaN among its weights."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(demo_folder, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of an S3 server with the bucket `bucket`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()
