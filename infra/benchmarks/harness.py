"""lm-evaluation-harness's requests by our model and by its own `hf`, beside each other, on a CPU.

    OMP_NUM_THREADS=1 python infra/benchmarks/harness.py [--questions 150] [--batch-size 16]

Multiple choice as the harness asks it: a request for each of four options, all with the context of
their question, about 500 tokens of the source of the standard library. Seconds are of the CPU time
of this process, which other work on the machine changes little, and of the clock. Loading is left
out; the largest difference between the two is shown.
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
# Of a context and of an option, about 500 and 10 tokens of the bundled model's.
_CONTEXT, _OPTION, _OPTIONS = 1600, 32, 4


def make_requests(num_questions: int) -> list[Any]:
    """Requests for log-likelihoods, the options of a question one after another."""
    rng = random.Random(0)
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)

    def cut(size: int) -> str:
        start = rng.randrange(len(text) - size)
        return text[start : start + size]

    contexts = [cut(_CONTEXT) for _ in range(num_questions)]
    pairs = [(context, " " + cut(_OPTION)) for context in contexts for _ in range(_OPTIONS)]
    return [
        Instance("loglikelihood", doc={}, arguments=pair, idx=i, metadata=("choice", i, 1))
        for i, pair in enumerate(pairs)
    ]


def main() -> None:
    """Time both, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16, help="of hf")
    arguments = parser.parse_args()
    requests = make_requests(arguments.questions)
    folder = str(MODEL)
    models = {
        "logitmill": LogitmillLM(folder, device="cpu"),
        "hf": HFLM(
            pretrained=folder, device="cpu", dtype="float32", batch_size=arguments.batch_size
        ),
    }
    found: dict[str, list[tuple[float, bool]]] = {}
    for name, model in models.items():
        model.loglikelihood(requests[:_OPTIONS], disable_tqdm=True)
        clock, work = time.perf_counter(), time.process_time()
        found[name] = model.loglikelihood(requests, disable_tqdm=True)
        work, clock = time.process_time() - work, time.perf_counter() - clock
        rate = len(requests) / work
        print(f"{name:10} {work:8.1f} s of CPU {clock:8.1f} s {rate:8.1f} options/s of CPU")
    ours, theirs = found.values()
    off = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference {off:.1e} nats of {max(-a[0] for a in ours):.0f}")


if __name__ == "__main__":
    main()
