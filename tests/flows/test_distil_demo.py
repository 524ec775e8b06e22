"""The worked example: a student of stored distributions beats one of the text alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from direct import score_directly
from logitmill.engine import pipeline
from logitmill.flows import Run

FILE = Path(__file__).parents[2] / "infra/demo/distil.py"


@pytest.fixture(scope="module")
def distil() -> Any:
    spec = importlib.util.spec_from_file_location("distil", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("sys").modules, "distil", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("distil")
    source = Path(json.__file__)
    for name in ("decoder", "encoder", "scanner"):
        (root / f"{name}.py").write_text(source.with_name(f"{name}.py").read_text())
    return score_directly(demo_folder, root, root / "runs", tiers=["topk"])


def test_the_distilled_student_is_ahead_on_text_that_neither_has_seen(
    distil: Any, run: Run, tmp_path: Path
) -> None:
    plan = distil.Plan(hidden_size=64, num_layers=1, context=64, batch_size=8, num_steps=60)
    text = Path(json.__file__).with_name("tool.py").read_text()
    folder = tmp_path / "student"
    losses = distil.compare(run, [text], plan, folder)
    assert losses["teacher"] < losses["distilled"] < losses["text alone"] - 0.05
    # What was kept is a model that the engine scores with.
    found = distil.held_out_loss(folder, [text], plan.context)
    assert found == pytest.approx(losses["distilled"], abs=1e-5)
    assert pipeline(folder).vocab_size == 4096


def test_both_students_see_the_same_batches(distil: Any, run: Run) -> None:
    plan = distil.Plan(context=32, batch_size=4)
    ways = [distil.batches(run, plan, 4096) for _ in range(2)]
    for _ in range(3):
        one, other = (next(way) for way in ways)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["input_ids"].shape == one["mask"].shape
    assert one["top_ids"].shape == (*one["mask"].shape, 20)
    a, b = (distil.make_student(plan, 50).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("option", "value"), [("--files", "0"), ("--files", "999999"), ("--steps", "0")]
)
def test_what_leaves_nothing_to_train_on_or_to_measure_is_refused(
    distil: Any,
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["distil.py", option, value])
    with pytest.raises(SystemExit):
        distil.main()
    assert f"error: {option}: {value}" in capsys.readouterr().err
