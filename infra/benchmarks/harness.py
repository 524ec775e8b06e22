"""lm-evaluation-harness's requests by our model and by its own `hf`, beside each other, on a CPU.

    OMP_NUM_THREADS=1 python infra/benchmarks/harness.py [--batch-size 16]

The source of the standard library, asked for as the harness does: the four options of questions of
about 500 tokens, a request each; whole documents; and 32 tokens that follow on the questions.
Seconds are of the CPU time of this process, which other work on the machine changes little, and of
the clock. Loading is left out; the largest difference between the two is shown.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from logitmill.flows.harness import LogitmillLM

MODEL = Path(__file__).parents[1] / "demo/model"
# Characters of a question, an option and the longest document: 500, 10 and 2,500 tokens, about.
_CONTEXT, _OPTION, _DOCUMENT = 1600, 32, 8000
_OPTIONS, _NEW_TOKENS = 4, 32


def make_requests(num_questions: int, num_documents: int, num_prompts: int) -> dict[str, list[Any]]:
    """Requests by their kind."""
    rng = random.Random(0)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)

    def cut(size: int) -> str:
        start = rng.randrange(len(text) - size)
        return text[start : start + size]

    questions = [cut(_CONTEXT) for _ in range(num_questions)]
    how = {"until": ["\n\n"], "max_gen_toks": _NEW_TOKENS, "do_sample": False}
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(q, " " + cut(_OPTION)) for q in questions for _ in range(_OPTIONS)],
        "loglikelihood_rolling": [
            (cut(rng.randrange(_OPTION, _DOCUMENT)),) for _ in range(num_documents)
        ],
        "generate_until": [(question, how) for question in questions[:num_prompts]],
    }
    return {
        kind: [
            Instance(kind, doc={}, arguments=a, idx=i, metadata=(kind, i, 1))
            for i, a in enumerate(every)
        ]
        for kind, every in arguments.items()
    }


def main() -> None:
    """Time both, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16, help="of hf")
    arguments = parser.parse_args()
    asked = make_requests(arguments.questions, arguments.documents, arguments.prompts)
    folder = str(MODEL)
    models = {
        "logitmill": LogitmillLM(folder, device="cpu"),
        "hf": HFLM(
            pretrained=folder, device="cpu", dtype="float32", batch_size=arguments.batch_size
        ),
    }
    for kind, requests in asked.items():
        found: dict[str, list[Any]] = {}
        for name, model in models.items():
            answer = getattr(model, kind)
            answer(requests[:_OPTIONS], disable_tqdm=True)
            clock, work = time.perf_counter(), time.process_time()
            found[name] = answer(requests, disable_tqdm=True)
            work, clock = time.process_time() - work, time.perf_counter() - clock
            print(f"{kind:22} {name:10} {work:8.1f} s of CPU {clock:8.1f} s", flush=True)
        print(f"{kind:22} {_compare(*found.values())}", flush=True)


def _compare(ours: list[Any], theirs: list[Any]) -> str:
    if isinstance(ours[0], str):
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return f"{equal} of {len(ours)} texts are equal"
    sums = [[x[0] if isinstance(x, tuple) else x for x in found] for found in (ours, theirs)]
    off = max(abs(a - b) for a, b in zip(*sums, strict=True))
    return f"largest difference {off:.1e} nats, of sums up to {max(map(abs, sums[0])):.0f}"


if __name__ == "__main__":
    main()
