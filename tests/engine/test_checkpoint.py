"""What a model folder can be, and what a broken one gets: one line that names what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline
from logitmill.engine.checkpoint import Checkpoint, Sizes, digest, find_model
from logitmill.engine.pipeline import EngineSettings, inspect_model, inspect_placement
from logitmill.engine.staging import Stage
from oracles import byte_tokenizer, shard, table_model
from safetensors.torch import load_file, save_file

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    return table_model(tmp_path / "model", draw.normal(size=(20, 20)), tokenizer=None)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path | str) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the message
        pipeline(folder, device="cpu")
    said = str(raised.value)
    if Path(folder).is_dir() and "NaN or infinite" not in said:
        with pytest.raises(ValueError) as inspected:  # noqa: PT011
            inspect_placement(Path(folder), EngineSettings(device="cpu"))
        assert str(inspected.value) == said, "what needs no weights is told without them"
    return said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    change_tensors(folder, lambda tensors: tensors[Q][0, 3].fill_(value))
    said = refusal(folder)
    assert Q in said
    assert "NaN or infinite" in said


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(Q))
    assert f"tensor {Q} is not in the safetensors of {folder}" in refusal(folder)


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({Q: torch.zeros(3, 20)}))
    said = refusal(folder)
    assert Q in said
    assert "[3, 20]" in said
    assert "[2, 20]" in said


def test_a_tensor_that_has_no_place_is_named(folder: Path) -> None:
    """Left out in silence, a bias would make every score slightly wrong."""
    bias = Q.replace("weight", "bias")
    change_tensors(folder, lambda tensors: tensors.update({bias: torch.zeros(2)}))
    assert bias in refusal(folder)


def test_buffers_of_old_checkpoints_are_no_stray_tensors(folder: Path) -> None:
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({old: torch.zeros(1)}))
    pipeline(folder, device="cpu")


@pytest.mark.parametrize("kept", [0, 4, 60, 0.5, 0.99])
def test_truncated_safetensors_are_refused(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    said = refusal(folder)
    assert str(file) in said
    assert "not a whole safetensors file" in said


def test_a_missing_or_truncated_shard_is_named(folder: Path) -> None:
    shard(folder, 3)
    file = folder / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    # Its last tensor, by where it lies and not by name.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    last = max(tensors, key=lambda name: tensors[name]["data_offsets"][1])
    file.write_bytes(data[:-1])
    said = refusal(folder)
    assert f"{file} is not a whole safetensors file: it ends at byte {len(data) - 1}, and" in said
    assert f"tensor {last} at byte {len(data)}; fetch it again" in said
    file.unlink()
    said = refusal(folder)
    assert f"{file} is named in model.safetensors.index.json but is not there" in said
    assert said.rpartition("with it tensor ")[2] in tensors


def test_a_tensor_that_the_index_places_wrongly_is_named(folder: Path) -> None:
    shard(folder, 2)
    index = folder / "model.safetensors.index.json"
    state = json.loads(index.read_text())
    others = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    state["weight_map"][Q] = (others - {state["weight_map"][Q]}).pop()
    index.write_text(json.dumps(state))
    assert Q in refusal(folder)


def test_sizes_are_those_of_all_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    for num_files in (1, 3):
        sizes = Checkpoint.open(folder).check_files()
        assert sizes == Sizes(len(tensors), num_bytes, num_files)
        if num_files == 1:
            shard(folder, 3)
    said = f"{len(tensors)} tensors, {num_bytes / 1e9:.2f} GB in 3 files"
    assert inspect_model(folder, EngineSettings(device="cpu")).weights == said


def test_a_pickle_is_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = refusal(folder)
    assert "pytorch_model.bin is not read, since a pickle runs whatever code is in it" in said
    (folder / "pytorch_model.bin").rename(folder / "model.gguf")
    said = refusal(folder)
    assert "model.gguf cannot be read, convert to safetensors" in said
    assert "a pickle runs" not in said


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not valid JSON"), ("[]", "holds a list"), ("{}", "names no 'architectures'")],
)
def test_a_config_that_is_none_is_refused(folder: Path, text: str, said: str) -> None:
    (folder / "config.json").write_text(text)
    assert said in refusal(folder)


def test_quantized_weights_of_an_unknown_method_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "hqq", "bits": 4})
    said = refusal(folder)
    assert "quant_method 'hqq'" in said
    assert "awq, gptq, compressed-tensors, fp8, smooth_quant" in said


def test_quantized_weights_of_an_architecture_that_is_not_native_are_refused(folder: Path) -> None:
    change_config(
        folder,
        architectures=["BloomForCausalLM"],
        quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128},
    )
    said = refusal(folder)
    assert "quantization: 'awq'" in said
    assert "BloomForCausalLM" in said


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    assert name in refusal(name)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    said = refusal("someone/something")
    assert "neither a local folder nor a model that the Hub hands out (no network)" in said


def test_the_hubs_cache_is_used_without_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, as all tests are, by branch and by commit; a revision that is not there is none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub/models--someone--something"
    snapshot = cached / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    assert find_model("someone/something") == snapshot
    assert find_model("someone/something", revision=commit) == snapshot
    with pytest.raises(ValueError, match="'someone/something' is neither a local folder nor"):
        find_model("someone/something", revision="v2")


def test_a_file_is_no_folder(folder: Path) -> None:
    assert "name the folder" in refusal(folder / "config.json")
    assert find_model(str(folder)) == folder


def test_the_digest_is_of_names_and_contents(folder: Path) -> None:
    before = digest(folder)
    (folder / "README.md").write_text("words do not change a model")
    assert digest(folder) == before
    byte_tokenizer().save_pretrained(folder)
    with_tokenizer = digest(folder)
    assert with_tokenizer != before
    (folder / "tokenizer.json").rename(folder / "tokenizer2.json")
    assert digest(folder) not in (before, with_tokenizer)


def test_unknown_settings_are_named(folder: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "int3"}, "dtype: 'int3' is not one of float32"),
        ({"device": "abacus"}, "device: 'abacus' is not a device"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: 0 is not at least 1"),
        ({"logits_memory": 1000}, "logits_memory: 1000 bytes is less than the 15360 bytes"),
    ]
    for settings, said in cases:
        with pytest.raises(ValueError, match=said):
            pipeline(folder, **({"device": "cpu"} | settings))


# ---- on the way to a GPU: the same code, its buffers not pinned ------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_threads", [1, 8])
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 12345])
def test_a_stage_brings_every_byte(size: int, num_threads: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).integers(0, 256, size + 20, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    stage = Stage(CPU, chunk_bytes=100, num_threads=num_threads)
    with (tmp_path / "file").open("rb") as file:
        for start in (0, 13):
            out = torch.zeros(size, dtype=torch.uint8)
            stage.fetch(file.fileno(), start, out)
            assert out.numpy().tobytes() == data[start : start + size].tobytes()
        for more in (30, 500):
            with pytest.raises(EOFError, match=f"the file ends at byte {size + 20}"):
                stage.fetch(file.fileno(), 13, torch.zeros(size + more, dtype=torch.uint8))
        # A failure leaves the buffers to those that come after.
        stage.fetch(file.fileno(), 0, out)
    stage.close()
    assert out.numpy().tobytes() == data[:size].tobytes()


STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def stored_tensors() -> dict[str, torch.Tensor]:
    draw = torch.randn(33, 7)
    tensors = {str(dtype): draw.to(dtype) for dtype in STORED}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "int32": torch.arange(-5, 5, dtype=torch.int32),
        "int8": torch.arange(-5, 5, dtype=torch.int8),
        "e8m0": torch.tensor([1.0, 4.0]).to(torch.float8_e8m0fnu),
    }
    return tensors


def open_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    (folder / "config.json").write_text('{"architectures": ["Some"]}')
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def test_tensors_arrive_as_they_are_stored(tmp_path: Path) -> None:
    tensors = stored_tensors()
    checkpoint = open_tensors(tmp_path, tensors)
    for name, expected in tensors.items():
        shape = tuple(expected.shape)
        assert checkpoint.shape(name) == shape
        assert checkpoint.dtype(name) == expected.dtype
        for tensor in (checkpoint.read(name, shape), checkpoint._fetch(name, CPU)):
            assert tensor.dtype == expected.dtype
            assert tensor.shape == expected.shape
            assert torch.equal(tensor.float(), expected.float())
    checkpoint.finish()
    assert checkpoint.unread() == []


def write_by_hand(file: Path, sizes: dict[str, int]) -> None:
    """A file of bytes that are all zero, and are nowhere on the disk."""
    end, header = 0, {}
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """Mapped to be written to, it would be more than the system may promise."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "config.json").write_text('{"architectures": ["Some"]}')
    write_by_hand(tmp_path / "model.safetensors", {"large": 3 * memory, "small": 5})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.check_files() == Sizes(2, 3 * memory + 5, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(checkpoint.read("small", (5,)), torch.zeros(5, dtype=torch.uint8))
    checkpoint.finish()


def test_tensors_that_lie_at_odd_bytes_are_read(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(3, 5), "half": torch.randn(7).bfloat16()}
    checkpoint = open_tensors(tmp_path, tensors)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes((start - 7).to_bytes(8, "little") + data[8:start] + b" " + data[start:])
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.read(name, tuple(expected.shape)), expected)


@pytest.mark.parametrize("dtype", STORED)
def test_tensors_on_a_gpu_are_checked_at_the_end(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"good": torch.ones(3), "bad": torch.ones(200).to(dtype), "last": torch.ones(2)}
    tensors["bad"].view(torch.uint8)[-dtype.itemsize :] = 0xFF
    checkpoint = open_tensors(tmp_path, tensors)
    for name in tensors:
        checkpoint._fetch(name, CPU)
    with pytest.raises(ValueError, match=r"tensor bad in .* holds NaN or infinite"):
        checkpoint.finish()
    with pytest.raises(ValueError, match=r"tensor bad in .* holds NaN or infinite"):
        checkpoint.read("bad", (200,))


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    checkpoint = open_tensors(tmp_path, {"weight": torch.ones(5000)})
    checkpoint.shape("weight")
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 100)
    with pytest.raises(ValueError, match=r"tensor weight cannot be read from .*: the file ends at"):
        checkpoint._fetch("weight", CPU)
    with pytest.raises(ValueError, match=r"tensor weight cannot be read from "):
        checkpoint.read("weight", (5000,))


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    checkpoint = open_tensors(tmp_path, {"weight": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"tensor weight in .* is stored as C64"):
        checkpoint.dtype("weight")
