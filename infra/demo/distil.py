"""Distil the bundled model into a smaller one, from what a run has stored of its distributions.

The teacher scores modules of this machine's Python standard library and keeps, of every token, the
likeliest ones and the mass of all others (`--keep topk`). Two students of the same size, weights
and batches are then trained on the same tokens: one on the text alone, one on the stored
distributions, without the teacher at hand. Both are measured on modules that neither has seen.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from logitmill.engine import pipeline
from logitmill.engine.losses import top_k_kl
from logitmill.flows import Run, open_run, score_corpus
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TEACHER = Path(__file__).resolve().parent / "model"
SEED = 20261123


@dataclass(frozen=True)
class Plan:
    """How large a student is, and how it is trained."""

    hidden_size: int = 128
    num_layers: int = 2
    context: int = 64
    batch_size: int = 16
    num_steps: int = 300
    learning_rate: float = 8e-3


def make_student(plan: Plan, vocab_size: int) -> LlamaForCausalLM:
    """A small decoder with the teacher's vocabulary; the same weights every time."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=5 * plan.hidden_size // 2,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=max(1, plan.hidden_size // 32),
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def batches(run: Run, plan: Plan, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Pieces of documents in a random order, padded; as many epochs as it takes."""
    examples = run.distillation(
        vocab_size=vocab_size,
        tokenizer=TEACHER,
        context=plan.context,
        shuffle_buffer=64 * plan.batch_size,
        seed=SEED,
    )
    epoch, held = 0, []
    while True:
        examples.set_epoch(epoch)
        for example in examples:
            held.append(example)
            if len(held) == plan.batch_size:
                yield collate(held)
                held = []
        epoch += 1


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Examples as one batch [examples, inputs, ...], with a `mask` of what is not padding."""
    names = ("input_ids", "target_ids", "top_ids", "top_logprobs", "log_tail_mass")
    batch = {n: pad_sequence([e[n] for e in examples], batch_first=True) for n in names}
    ones = [torch.ones(len(e["input_ids"]), dtype=torch.bool) for e in examples]
    return {**batch, "mask": pad_sequence(ones, batch_first=True)}


def train(run: Run, plan: Plan, *, distils: bool) -> LlamaForCausalLM:
    """A student after `num_steps` batches, on the distributions of a run or on its text alone."""
    vocab_size = run.plan["model"]["vocab_size"]
    student = make_student(plan, vocab_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=plan.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, plan.num_steps, pct_start=0.1
    )
    for step, batch in zip(range(plan.num_steps), batches(run, plan, vocab_size), strict=False):
        # What is padding stands behind what is not, where nothing sees it.
        logits = student(input_ids=batch["input_ids"]).logits
        mask = batch["mask"]
        if distils:
            stored = (batch[name] for name in ("top_ids", "top_logprobs", "log_tail_mass"))
            loss = top_k_kl(logits, *stored, mask=mask)
        else:
            loss = cross_entropy(logits[mask], batch["target_ids"][mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step:4}  loss {loss.item():.3f}", flush=True)
    return student.eval()


def save(student: LlamaForCausalLM, folder: Path) -> None:
    """A model folder in Hugging Face layout, with the teacher's tokenizer."""
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)


def held_out_loss(model: Path, texts: Sequence[str], context: int) -> float:
    """Nats a token over texts, by the recipe `rolling`."""
    records = [score.record for score in pipeline(model).score(texts, context=context)]
    total = sum(record.loglikelihood or 0.0 for record in records)
    return -total / sum(record.num_tokens_scored for record in records)


def compare(run: Run, texts: Sequence[str], plan: Plan, keep: Path | None) -> dict[str, float]:
    """Held-out losses of the teacher and of both students, nats a token.

    The distilled student is left in the folder `keep`, if one is given.
    """
    losses = {"teacher": held_out_loss(TEACHER, texts, plan.context)}
    for name in ("text alone", "distilled"):
        print(f"student, {name}:", flush=True)
        student = train(run, plan, distils=name == "distilled")
        with tempfile.TemporaryDirectory() as scratch:
            folder = keep if keep is not None and name == "distilled" else Path(scratch)
            save(student, folder)
            losses[name] = held_out_loss(folder, texts, plan.context)
    return losses


def main() -> None:
    """Score, train both, print what the stored distributions were worth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=40, help="to train on (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of training (default %(default)s)")
    parser.add_argument("--out", default="runs", help="folder for runs (default %(default)s)")
    parser.add_argument("--save", type=Path, help="folder for the distilled student")
    arguments = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(library.glob("*.py"))
    # The others are what both students are measured on.
    if not 1 <= arguments.files < len(modules):
        parser.error(
            f"--files: {arguments.files} of {len(modules)} modules; give 1 or more, not all"
        )
    if arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps}; give 1 or more")
    corpus = str(library / "*.py")
    uri = score_corpus(
        model=str(TEACHER), corpus=corpus, out=arguments.out, limit=arguments.files, tiers=["topk"]
    )
    run = open_run(uri)
    assert run.manifest is not None
    held_out = [p.read_text() for p in modules[arguments.files :][::6][:8]]
    plan = Plan(num_steps=arguments.steps)
    print(f"{uri}: {run.manifest['tokens']:,} tokens, the {run.plan['top_k']} likeliest of each")
    losses = compare(run, held_out, plan, arguments.save)
    print(f"held-out loss on {len(held_out)} modules, nats a token:")
    for name, loss in losses.items():
        print(f"  {name:12}{loss:6.3f}")


if __name__ == "__main__":
    main()
