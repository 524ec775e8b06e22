"""The harness's model `logitmill` gives the numbers of its `hf` backend, and says what is wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from backends import load_hf, make_requests

pytest.importorskip("lm_eval.models.huggingface")

from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager
from logitmill.flows import plugin
from logitmill.flows.harness import LogitmillLM

ROOT = Path(__file__).parents[2]
TASKS = ["code_choice", "code_word", "code_perplexity"]
# Nats; beyond 10 of them relative, since transformers' sums over tokens are float32.
ABSOLUTE, RELATIVE = 1e-4, 1e-5
LOOK = """
import lm_eval, torch
from lm_eval.api.registry import model_registry
print("logitmill" in model_registry, "hf" in model_registry)
"""
HOOK = "[torch.backends]\nlogitmill = logitmill.flows.plugin:register\n"

CODE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
ODD = "naïve 漢字 😀 ½ e\u0301 \t\n  ÿ <|bos|> <|eos|> " * 150


@pytest.fixture(scope="module")
def lm(demo_folder: Path) -> LogitmillLM:
    return LogitmillLM(str(demo_folder), device="cpu")


@pytest.fixture(scope="module")
def hf(demo_folder: Path) -> Any:
    return load_hf(demo_folder)


def draw_pairs(rng: random.Random, most: int) -> Iterator[tuple[str, str]]:
    """Contexts with one or four continuations: empty ones, long ones, white space, odd letters."""

    def cut(size: int) -> str:
        text = rng.choice([CODE, CODE, ODD])
        first = rng.randrange(len(text) - size)
        return text[first : first + size]

    endings = ["", "", " ", "\n", "  \n\t", " \u3000"]
    while True:
        context = cut(rng.choice([1, 30, 300, most])) + rng.choice(endings)
        if rng.random() < 0.2:
            context = rng.choice(["", "<|bos|>", "<|bos|>" + context])
        for _ in range(rng.choice([1, 4])):
            yield context, cut(rng.choice([1, 2, 5, 60]))


def ask(model: Any, kind: str, arguments: Sequence[tuple[str, ...]]) -> list[Any]:
    return getattr(model, kind)(make_requests(kind, arguments), disable_tqdm=True)


def answer_both(
    model: LogitmillLM, hf: Any, pairs: Iterator[tuple[str, str]], count: int
) -> tuple[list[Any], list[Any]]:
    """Answers of both to the first `count` requests that `hf` does not refuse."""
    kept, expected = [], []
    for pair in pairs:
        try:
            expected += ask(hf, "loglikelihood", [pair])
        except AssertionError:  # The continuation is the end of a token that the context begins.
            with pytest.raises(ValueError, match="no token is left"):
                ask(model, "loglikelihood", [pair])
            continue
        kept.append(pair)
        if len(kept) == count:
            break
    return ask(model, "loglikelihood", kept), expected


def check(answers: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [a[0] for a in answers] == pytest.approx(
        [e[0] for e in expected], rel=RELATIVE, abs=ABSOLUTE
    )
    assert [a[1] for a in answers] == [e[1] for e in expected]


@pytest.mark.slow
def test_drawn_requests_come_out_as_those_of_hf(lm: LogitmillLM, hf: Any) -> None:
    pairs = draw_pairs(random.Random(1), most=5000)
    greedy = [("def f(self, x):\n        return self", "."), ("for i in", " range(")]
    answers, expected = answer_both(lm, hf, chain(greedy, pairs), 30)
    check(answers, expected)
    assert {greedy for _, greedy in expected} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{"add_bos_token": False}, {"add_bos_token": True, "prefix_token_id": 1, "max_length": 20}],
    ids=str,
)
def test_settings_mean_what_they_mean_to_hf(demo_folder: Path, arguments: dict[str, Any]) -> None:
    """Contexts and documents are longer than a `max_length` of 20, and continuations mostly not."""
    model = LogitmillLM(str(demo_folder), device="cpu", **arguments)
    hf = load_hf(demo_folder, **arguments)
    pairs = draw_pairs(random.Random(2), most=600)
    pairs = (p for p in pairs if len(hf.tok_encode(p[1], add_special_tokens=False)) < 17)
    check(*answer_both(model, hf, (p for p in pairs if p[0].strip()), 20))
    texts = [("",), ("x",), (ODD[:300],), (CODE[:200],)]
    expected = ask(hf, "loglikelihood_rolling", texts)
    assert ask(model, "loglikelihood_rolling", texts) == pytest.approx(
        expected, rel=RELATIVE, abs=ABSOLUTE
    )


@pytest.mark.slow
def test_rolling_requests_come_out_as_those_of_hf(lm: LogitmillLM, hf: Any) -> None:
    """Of as many tokens as a window holds, of one more, and of several windows."""
    tokens = lm.tokenizer.encode(CODE, add_special_tokens=False)
    texts = [(lm.tokenizer.decode(tokens[:n]),) for n in (1, 1022, 1023, 1024, 2100)]
    texts += [("",), (" ",), ("<|bos|>import os",), (ODD[:900],), (ODD[:900],)]
    lengths = [len(lm.tok_encode(text)) for (text,) in texts]
    assert {1023, 1024, 1025} <= set(lengths)
    expected = ask(hf, "loglikelihood_rolling", texts)
    answers = ask(lm, "loglikelihood_rolling", texts)
    assert answers == pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


@pytest.mark.slow
def test_drawn_texts_come_out_as_those_of_hf_in_float64(lm: LogitmillLM, demo_folder: Path) -> None:
    """Of up to thousands of nats, of which hf in float32 is 1e-3 off."""
    rng = random.Random(3)
    texts = []
    for size in (1, 30, 300, 300, 1000, 4000):
        text = rng.choice([CODE, CODE, ODD])
        first = rng.randrange(len(text) - min(size, len(text) - 1))
        texts.append((text[first : first + size],))
    exact = load_hf(demo_folder, dtype="float64")
    expected = ask(exact, "loglikelihood_rolling", texts)
    assert min(expected) < -1000
    answers = ask(lm, "loglikelihood_rolling", texts)
    assert answers == pytest.approx(expected, rel=1e-7, abs=ABSOLUTE)


def test_white_space_alone_is_no_context(demo_folder: Path) -> None:
    """Where no BOS stands in front the harness has no token of it, and `hf` fails."""
    model = LogitmillLM(str(demo_folder), device="cpu", add_bos_token=False)
    alone, empty = ask(model, "loglikelihood", [(" \n", "x = 1"), ("", " \nx = 1")])
    assert alone == empty


def test_answers_do_not_depend_on_the_list(lm: LogitmillLM) -> None:
    """In any order, alone or with others, the very same numbers."""
    pairs = draw_pairs(random.Random(3), most=600)
    kept = [p for p, _ in zip(pairs, range(40), strict=False) if p[1].strip()][:16]
    answers = ask(lm, "loglikelihood", kept)
    assert ask(lm, "loglikelihood", kept[::-1]) == answers[::-1]
    assert [ask(lm, "loglikelihood", [pair])[0] for pair in kept[:4]] == answers[:4]


@pytest.fixture
def scored(lm: LogitmillLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The documents that the engine is given."""
    seen: list[Any] = []
    score = lm._pipe.score

    def spy(documents: Any, **settings: Any) -> Any:
        new = list(documents)
        seen.extend(new)
        return score(new, **settings)

    monkeypatch.setattr(lm._pipe, "score", spy)
    return seen


def test_equal_requests_are_scored_once_and_like_ones_are_neighbours(
    lm: LogitmillLM, scored: list[Any]
) -> None:
    contexts = ["def f(x):\n    return", "import os\nimport", "def f(x):\n    yield"]
    options = [" x", " sys", " None"]
    pairs = [(c, o) for o in options for c in contexts] * 2
    answers = ask(lm, "loglikelihood", pairs)
    assert answers[:9] == answers[9:]
    assert len(scored) == 9
    began = [tuple(d.input_ids[: d.num_context]) for d in scored]
    runs = [context for i, context in enumerate(began) if i == 0 or began[i - 1] != context]
    assert len(runs) == len(contexts)
    # Of the contexts, those that begin alike are beside each other too.
    alike = ["def f(" in lm.tokenizer.decode(run) for run in runs]
    assert alike in ([True, True, False], [False, True, True])


@pytest.fixture
def cached(lm: LogitmillLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model behind the harness's cache of answers (`--use_cache`)."""
    monkeypatch.setattr(lm, "cache_hook", lm.cache_hook)
    return CachingLM(lm, str(tmp_path / "answers.db"))


def test_the_cache_of_the_harness_is_filled_and_used(cached: Any, scored: list[Any]) -> None:
    pairs = [("import", " os"), ("import", " sys"), ("return", " None")]
    texts = [("x = 1\n",), ("y = 2\n",)]
    expected = cached.loglikelihood(make_requests("loglikelihood", pairs))
    rolling = cached.loglikelihood_rolling(make_requests("loglikelihood_rolling", texts))
    num_scored = len(scored)
    assert cached.loglikelihood(make_requests("loglikelihood", pairs[::-1])) == expected[::-1]
    assert cached.loglikelihood_rolling(make_requests("loglikelihood_rolling", texts)) == rolling
    assert len(scored) == num_scored


def test_what_is_stopped_half_way_keeps_its_answers(
    lm: LogitmillLM, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("import", " os"), ("import", " sys"), ("return", " None")]
    score = lm._pipe.score

    def stop(documents: Any, **settings: Any) -> Iterator[Any]:
        yield from islice(score(documents, **settings), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm._pipe, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            cached.loglikelihood(make_requests("loglikelihood", pairs))
    assert len(cached.dbdict) == 2
    rest = cached.loglikelihood(make_requests("loglikelihood", pairs))
    assert rest == ask(lm, "loglikelihood", pairs)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Of the bundled tasks alone, whose data are named from the repository's root."""
    monkeypatch.chdir(ROOT)
    return TaskManager(include_path="infra/demo/tasks", include_defaults=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "settings", "least"),
    [
        (TASKS, {}, 7),
        (["code_choice"], {"num_fewshot": 2, "apply_chat_template": True}, 2),
    ],
    ids=["plain", "chat"],
)
def test_tasks_come_out_as_with_hf(
    lm: LogitmillLM,
    hf: Any,
    manager: TaskManager,
    tasks: list[str],
    settings: dict[str, Any],
    least: int,
) -> None:
    def run(model: Any) -> dict[str, float]:
        found = simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings
        )
        assert found is not None
        return {
            f"{task} {metric}": value
            for task, metrics in found["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        }

    expected = run(hf)
    assert run(lm) == pytest.approx(expected, rel=1e-4)
    assert len(expected) >= least


def test_a_chat_is_rendered_as_hf_renders_it(lm: LogitmillLM, hf: Any) -> None:
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So"},
    ]
    for prompt, messages in ((True, chat[:2]), (False, chat)):
        text = lm.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text == hf.apply_chat_template(messages, add_generation_prompt=prompt)
        assert text.startswith("<|bos|>")
        assert lm.tok_encode(text) == hf.tok_encode(text)
        assert lm.tok_encode(text).count(0) == 1
    assert lm.chat_template(True) == hf.chat_template(True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft": "x", "parallelize": True}, "model_args: peft, parallelize is not known.*dtype"),
        ({"pretrained": ""}, "pretrained: missing"),
        ({"pretrained": "./no/such"}, "pretrained: there is no folder './no/such'"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"dtype": "int3"}, "dtype: 'int3' is not one of float32"),
        ({"quantization": "int2"}, "quantization: 'int2'"),
        ({"max_length": 2048}, "max_length: 2048 is not within 2 ... 1024"),
        ({"max_length": "long"}, "max_length: 'long' is not a whole number"),
        ({"revision": 12}, "revision: 12 is not text; lm_eval reads digits as a number"),
        ({"chat_template_args": 3}, "chat_template_args: 3 is not a dictionary"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: 0 is not at least 1"),
        ({"prefix_token_id": 4096}, "prefix_token_id: 4096 is not in .* 4096"),
        ({"add_bos_token": "yes"}, "add_bos_token: 'yes' is not True or False"),
        ({"tokenizer": "./no/tokenizer"}, "tokenizer: none can be loaded from './no/tokenizer'"),
    ],
    ids=str,
)
def test_a_mistake_is_named_before_the_model_is_loaded(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("logitmill.flows.harness.load_pipeline", None)
    with pytest.raises(ValueError, match=message):
        LogitmillLM(**{"pretrained": str(demo_folder), "device": "cpu", **arguments})


def test_a_mistake_in_the_command_is_one_line(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"pretrained={demo_folder},quantisation=fp8"
    with pytest.raises(ValueError, match="model_args: quantisation is not known"):
        LogitmillLM.create_from_arg_string(given)
    monkeypatch.setattr(sys.modules["__main__"], "cli_evaluate", cli_evaluate, raising=False)
    with pytest.raises(SystemExit) as ended:
        LogitmillLM.create_from_arg_string(given)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model_args: quantisation is not known; logitmill takes pretr")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("import", ""), "continuation: of request 1 it is empty"),
        (("x", CODE), "continuation: of request 1 it has .* more than max_length, 1024"),
        (("ret", "urn"), "continuation: of request 1 no token is left"),
    ],
)
def test_a_request_that_cannot_be_scored_is_named(
    lm: LogitmillLM, pair: tuple[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(lm, "loglikelihood", [("import", " os"), pair])


def test_generated_texts_are_those_of_hf(lm: LogitmillLM, hf: Any) -> None:
    """Contexts of several lengths, one cut from the left; ends by text, token and length."""
    plain = {"until": ["\n\n"], "max_gen_toks": 12}
    short = {"until": "\n", "max_gen_toks": 4, "do_sample": False}
    ended = {"until": [" self", "<|eos|>"], "max_gen_toks": 12}
    arguments = [
        ("def f(self, x):\n    return", plain),
        ("import os\nimport", short),
        (CODE[:900], plain),
        ("class A(B):\n    def __init__(", ended),
        (CODE[:6000], short),
    ]
    requests = make_requests("generate_until", arguments)  # type: ignore[arg-type]
    found = lm.generate_until(requests, disable_tqdm=True)
    assert found == hf.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) == len(found)
    assert all("\n" not in found[i] for i in (1, 4))


def test_draws_are_decided_by_the_seed(lm: LogitmillLM) -> None:
    def draw(**settings: Any) -> list[str]:
        wish = {"until": [], "max_gen_toks": 6, "do_sample": True, "top_p": 0.9, **settings}
        requests = make_requests("generate_until", [("import", wish)] * 3)  # type: ignore[list-item]
        return lm.generate_until(requests, disable_tqdm=True)

    assert draw() == draw()
    assert len(set(draw())) > 1
    assert draw() != draw(seed=3)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: num_beams is not known; logitmill takes until"),
        ({"max_gen_toks": 1024}, "max_gen_toks: 1024 leaves no room for a context"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named(
    lm: LogitmillLM, wish: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate_until(make_requests("generate_until", [("x", wish)]))  # type: ignore[list-item]


def test_a_batch_size_is_said_to_have_no_effect(
    demo_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitmill.flows.harness.load_pipeline", lambda *_: None)
    folder = str(demo_folder)
    quiet = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    LogitmillLM.create_from_arg_string(f"pretrained={folder},dtype=auto", quiet)
    LogitmillLM.create_from_arg_obj({"pretrained": folder}, {**quiet, "batch_size": "auto:4"})
    assert not caplog.records
    # An argument goes before the option that lm_eval's command fills in.
    LogitmillLM.create_from_arg_obj(
        {"pretrained": folder, "device": "cpu"}, {"batch_size": 8, "device": "cuda:7"}
    )
    assert "batch_size: 8 has no effect" in caplog.text


def test_the_harness_knows_the_name_and_all_others() -> None:
    for _ in range(2):
        plugin.register()
        assert get_model("logitmill") is LogitmillLM
    assert {"hf", "vllm", "logitmill"} <= set(model_registry.keys())
    # How releases after 0.4.13 find it.
    assert EntryPoint("logitmill", plugin._CLASS, "lm_eval.models").load() is LogitmillLM


def test_without_a_harness_the_hook_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert "lm_eval" not in sys.modules


@pytest.mark.slow
def test_the_hook_is_called_in_time(tmp_path: Path) -> None:
    """torch calls its entry points when the harness imports it, before it looks for a model."""
    metadata = tmp_path / "hook-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hook\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(HOOK)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [sys.executable, "-c", LOOK],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == ["True", "True"]


def test_the_command_runs_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    # What the command sets.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    out = tmp_path / "results.json"
    command = "lm_eval --model logitmill --model_args pretrained=infra/demo/model"
    where = f"--tasks infra/demo/tasks/code_choice.yaml --limit 4 --output_path {out}"
    monkeypatch.setattr(sys, "argv", f"{command} {where}".split())
    cli_evaluate()
    assert "|code_choice|" in capsys.readouterr().out
    (path,) = tmp_path.glob("results*.json")
    found = json.loads(path.read_text())
    assert 0 <= found["results"]["code_choice"]["acc,none"] <= 1
    assert found["config"]["model_dtype"] == "float32"
    assert found["max_length"] == 1024
