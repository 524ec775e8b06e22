"""Other ways of scoring the same windows, as their users write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from ...engine.pipeline import DTYPES, EngineSettings
from .subject import Subject, Window

_LOOP_BATCH = 8
_PREFILL_TOKENS = 16384


class Peer(Protocol):
    """A loaded model of somebody else's."""

    name: str
    dtype: str
    """What its linears are multiplied in."""

    def score(self, windows: Sequence[Window]) -> float:
        """Sum of the log-probabilities of all targets, nats."""


class TransformersLoop:
    """What people write: padded batches in corpus order, log_softmax over all logits, a gather."""

    name = f"transformers, batches of {_LOOP_BATCH}"

    def __init__(
        self, subject: Subject, settings: EngineSettings, dtype: str, longest: int
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.dtype = dtype
        self._device = settings.resolve_device()
        model: Any = AutoModelForCausalLM.from_pretrained(subject.folder(), dtype=DTYPES[dtype])
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def score(self, windows: Sequence[Window]) -> float:
        total = 0.0
        for start in range(0, len(windows), _LOOP_BATCH):
            batch = windows[start : start + _LOOP_BATCH]
            longest = max(len(window.ids) for window in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, window in enumerate(batch):
                ids[row, : len(window.ids)] = torch.from_numpy(window.ids)
                mask[row, : len(window.ids)] = 1
            ids, mask = ids.to(self._device), mask.to(self._device)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            for row, window in enumerate(batch):
                scored = slice(window.num_context, len(window.ids))
                given = logprobs[row, scored.start - 1 : scored.stop - 1]
                total += given.gather(1, ids[row, scored, None]).double().sum().item()
        return total


class Vllm:
    """vLLM's prompt log-probabilities: the target's alone, without text, prefix cache off."""

    def __init__(
        self, subject: Subject, settings: EngineSettings, dtype: str, longest: int
    ) -> None:
        import vllm

        fp8 = settings.quantization in ("fp8", "fp8_block")
        self.name = f"vLLM {vllm.__version__}, prompt_logprobs=0"
        self.dtype = "fp8" if fp8 else dtype
        self._engine = vllm.LLM(
            model=str(subject.folder()),
            dtype=dtype,
            quantization="fp8" if fp8 else None,
            load_format="dummy" if subject.random else "auto",
            # One token is generated, wanted or not.
            max_model_len=longest + 1,
            max_num_batched_tokens=max(_PREFILL_TOKENS, longest + 1),
            enable_prefix_caching=False,
        )
        self._wanted = vllm.SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )

    def score(self, windows: Sequence[Window]) -> float:
        prompts = [{"prompt_token_ids": window.ids.tolist()} for window in windows]
        outputs = self._engine.generate(prompts, self._wanted, use_tqdm=False)
        # One entry a token but the first, which nothing predicts.
        return sum(
            sum(output.prompt_logprobs.logprobs[window.num_context - 1 :])
            for output, window in zip(outputs, windows, strict=True)
        )


class Lmdeploy:
    """LMDeploy's `get_ppl`: the mean negative log-likelihood of each sequence."""

    def __init__(
        self, subject: Subject, settings: EngineSettings, dtype: str, longest: int
    ) -> None:
        import lmdeploy

        self.name = f"LMDeploy {lmdeploy.__version__}, get_ppl"
        self.dtype = dtype
        engine = lmdeploy.PytorchEngineConfig(
            dtype=dtype,
            session_len=longest + 1,
            max_prefill_token_num=_PREFILL_TOKENS,
            enable_prefix_caching=False,
        )
        self._engine = lmdeploy.pipeline(str(subject.folder()), backend_config=engine)

    def score(self, windows: Sequence[Window]) -> float:
        means = self._engine.get_ppl([window.ids.tolist() for window in windows])
        # It scores all but the first token, which is all that a window without context asks for.
        return -sum(
            mean * (len(window.ids) - 1) for mean, window in zip(means, windows, strict=True)
        )


PEERS: dict[str, Callable[[Subject, EngineSettings, str, int], Peer]] = {
    "transformers": TransformersLoop,
    "vllm": Vllm,
    "lmdeploy": Lmdeploy,
}
"""By the name of what has to be installed. Each takes the subject, the engine's settings, the
dtype of the arithmetic and the tokens of the longest window."""


def check_peers(names: Sequence[str]) -> None:
    """ValueError for a peer that is not known or not installed."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer: {name!r} is not one of {', '.join(PEERS)}")
        if find_spec(name) is None:
            raise ValueError(f"peer: {name!r} is not installed here; pip install {name}")
