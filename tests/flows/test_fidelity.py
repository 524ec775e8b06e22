"""Differences between models, against what arithmetic by hand gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from logitmill.flows.bench.fidelity import compare_windows, sum_up
from logitmill.flows.bench.subject import Window
from logitmill.flows.compare import divergences
from logitmill.flows.compare.divergences import compare_logits

CPU = torch.device("cpu")


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits of known distributions, each row moved by a constant of its own."""
    shift = torch.arange(len(rows))[:, None] * 3.0 - 1.0
    return torch.tensor(rows, dtype=torch.float64).log() + shift


def test_two_known_distributions() -> None:
    base = logits((0.6, 0.4), (0.5, 0.5), (0.25, 0.75))
    other = logits((0.9, 0.1), (0.5, 0.5), (0.75, 0.25))
    found = compare_logits(base, other, torch.tensor([1, 0, 1]), CPU)
    kl = [
        0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1),
        0.0,
        0.25 * math.log(1 / 3) + 0.75 * math.log(3),
    ]
    assert kl[0] == pytest.approx(0.311239, abs=1e-6)
    np.testing.assert_allclose(found.kl_T, kl, atol=1e-14)
    # Of equals the lowest counts, in both.
    assert found.same_top_T.tolist() == [True, True, False]
    np.testing.assert_allclose(found.delta_p_T, [-0.3, 0.0, -0.5], atol=1e-14)

    agreement = sum_up(found)
    assert agreement.mean_kl == pytest.approx(sum(kl) / 3)
    assert agreement.max_kl == pytest.approx(max(kl))
    # Between the second and the largest of three, linearly: at 1.998 of places 0, 1, 2.
    assert agreement.kl_999 == pytest.approx(kl[0] + 0.998 * (kl[2] - kl[0]))
    assert agreement.same_top == pytest.approx(2 / 3)
    assert agreement.mean_delta_p == pytest.approx(-0.8 / 3)
    assert agreement.rms_delta_p == pytest.approx(math.sqrt((0.09 + 0.25) / 3))
    base_perplexity = (0.4 * 0.5 * 0.75) ** (-1 / 3)
    other_perplexity = (0.1 * 0.5 * 0.25) ** (-1 / 3)
    assert agreement.delta_perplexity == pytest.approx(other_perplexity - base_perplexity)


def test_what_the_base_rules_out_counts_nothing() -> None:
    base, other = torch.tensor([[0.0, -1e5]]), torch.tensor([[0.0, -2e5]])
    found = compare_logits(base, other, torch.tensor([0]), CPU)
    assert found.kl_T.tolist() == [0.0]


def test_rows_are_those_that_predict_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context is read and not compared, and blocks of rows leave none out."""
    monkeypatch.setattr(divergences, "_ROWS_AT_ONCE", 2)
    sizes = []

    def base(ids: np.ndarray) -> torch.Tensor:
        """Sure that token t is followed by t + 1, modulo 8."""
        sizes.append(len(ids))
        return 50.0 * torch.nn.functional.one_hot(torch.from_numpy((ids + 1) % 8), 8).float()

    def other(ids: np.ndarray) -> torch.Tensor:
        return base(ids) * 0.0

    given = [Window(np.array([5, 0, 1, 2, 3, 4]), 2), Window(np.array([1, 2]), 1)]
    (found,) = compare_windows([base], other, given, CPU)
    assert set(sizes) == {5, 1}
    # In the first window row 0 (5 -> 0) is context; everything scored was certain.
    np.testing.assert_allclose(found.base_nll_T, 0.0, atol=1e-12)
    np.testing.assert_allclose(found.other_nll_T, [math.log(8)] * 5)
    np.testing.assert_allclose(found.kl_T, [math.log(8)] * 5)


def test_a_table_of_the_bundled_model(demo_folder: Path, tmp_path: Path) -> None:
    from logitmill.engine.pipeline import EngineSettings
    from logitmill.flows.bench import Request, make_cases, measure_fidelity, show_fidelity
    from logitmill.flows.bench.fidelity import load_fidelities

    text = tmp_path / "text.py"
    text.write_text(Path(json.__file__).read_text()[:1500])
    request = Request(
        target=str(demo_folder),
        corpus=str(text),
        cases=make_cases(["int8", "fp8+head"], EngineSettings(device="cpu")),
    )
    named: list[str] = []
    found = measure_fidelity(request, command="logitmill bench ...", on_row=named.append)
    names = ["transformers bfloat16", "float32", "bfloat16", "int8", "fp8+head"]
    assert [row.name for row in found.rows] == named == names
    theirs, float32, bfloat16, int8, fp8 = (row.beside_float32 for row in found.rows)
    assert float32.mean_kl < 1e-9 and float32.same_top == 1.0
    assert float32.mean_kl < bfloat16.mean_kl < theirs.mean_kl < int8.mean_kl < fp8.mean_kl
    assert abs(float32.delta_perplexity) < 1e-4
    assert [row.beside_bfloat16 is None for row in found.rows] == [True] * 3 + [False] * 2
    assert found.tokens > 300

    file = tmp_path / "fidelity.jsonl"
    found.append(file)
    assert load_fidelities(file) == [found]
    show_fidelity(found)


def test_a_quantized_checkpoint_has_no_float32_model(demo_folder: Path, tmp_path: Path) -> None:
    from logitmill.engine.pipeline import EngineSettings
    from logitmill.flows.bench import Request, measure_fidelity

    config = json.loads((demo_folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("text")
    request = Request(
        target=str(folder),
        corpus=str(tmp_path / "text.txt"),
        cases=(EngineSettings(device="cpu"),),
    )
    with pytest.raises(ValueError, match=r"model: .* is stored as fp8"):
        measure_fidelity(request)
