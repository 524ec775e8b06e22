"""The engine as a model of lm-evaluation-harness: `lm_eval --model logitmill`.

Texts become tokens by the harness's rules, those of its `hf` backend: trailing whitespace of a
context belongs to the continuation, an empty context is the prefix token, what is too long is cut
from the left. How the harness finds this class is `plugin.py`'s.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from ..engine import EngineSettings
from ..engine.checkpoint import find_model
from ..engine.pipeline import inspect_model, load_pipeline
from .answers import Wish, read_stop_ids
from .likelihoods import Answer, TokenRequest, answer_requests
from .model_args import KINDS, check_arguments
from .plugin import register
from .versions import versions

log = logging.getLogger(__name__)

# What the command of the harness says where nobody names a device.
_DEFAULT_DEVICE = "cuda:0"
# Texts whose tokens are remembered: options of a question follow each other.
_REMEMBERED = 64


class LogitmillLM(TemplateLM):
    """Log-likelihoods and texts of the harness's requests, by the engine.

    A list of requests is scored as a whole: each distinct one once, those that begin alike beside
    each other, in batches by tokens.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        fp8_head: bool = False,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        max_batch_tokens: int | None = None,
        logits_memory: int | None = None,
        device_memory: int | None = None,
        residency: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: a folder in Hugging Face layout, its URI, or a Hub id.
            revision: branch, tag or commit of a Hub id.
            tokenizer: a folder or Hub id to take the tokenizer from; by default the model's own,
                as transformers' `AutoTokenizer` loads it.
            device, dtype, quantization, fp8_head, trust_remote_code, max_batch_tokens,
            logits_memory, device_memory, residency: as for `engine.pipeline`; dtype `auto` is the
                default.
            max_length: longest window in tokens; the model's own limit by default.
            add_bos_token: whether BOS stands in front of texts; by default as the tokenizer does.
            prefix_token_id: what stands for an empty context and in front of a rolling document;
                BOS by default, else EOS.
            chat_template_args: what a chat template is given besides the messages.
            enable_thinking: one of these.
            batch_size, max_batch_size: what the harness gives every model; batches are made of
                tokens (`max_batch_tokens`), so they have no effect.

        Raises:
            ValueError: naming the argument, its value and what would work.
        """
        super().__init__()
        given = {name: value for name, value in locals().items() if name in KINDS}
        known = LogitmillLM.__init__.__kwdefaults__ or {}
        check_arguments(pretrained, given, unknown, known)
        for name, value in (("batch_size", batch_size), ("max_batch_size", max_batch_size)):
            if value is not None and not re.fullmatch("1|auto.*", str(value)):
                log.warning(
                    "%s: %s has no effect, batches are made of tokens; max_batch_tokens limits "
                    "them",
                    *(name, value),
                )
        settings = EngineSettings(
            device=device,
            dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
            quantization=quantization,
            fp8_head=fp8_head,
            max_batch_tokens=max_batch_tokens,
            logits_memory=logits_memory,
            device_memory=device_memory,
            residency=residency,
            trust_remote_code=trust_remote_code,
        )
        try:
            folder = find_model(str(pretrained), revision=revision)
            facts = inspect_model(folder, settings)
        except ValueError as error:
            raise ValueError(re.sub("^model:", "pretrained:", str(error))) from None
        if max_length is not None and not 2 <= max_length <= facts.max_positions:
            raise ValueError(
                f"max_length: {max_length} is not within 2 ... {facts.max_positions}, the model's "
                "positions"
            )
        if prefix_token_id is not None and not 0 <= prefix_token_id < facts.vocab_size:
            raise ValueError(
                f"prefix_token_id: {prefix_token_id} is not in the model's vocabulary of "
                f"{facts.vocab_size}"
            )
        self.tokenizer = _load_tokenizer(
            tokenizer or folder,
            revision=None if tokenizer else revision,
            trust_remote_code=trust_remote_code,
            add_bos_token=add_bos_token,
        )
        self.max_length = max_length or facts.max_positions
        """Longest window in tokens."""
        self._quantization = facts.quantization
        self._pretrained, self._revision = str(pretrained), revision
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_args["enable_thinking"] = enable_thinking
        self._stop_ids = read_stop_ids(folder, self.tokenizer.eos_token_id)
        self._encode = lru_cache(_REMEMBERED)(self.tokenizer.encode)
        self._device = settings.resolve_device()
        self._pipe = load_pipeline(folder, settings)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> LogitmillLM:
        """As `create_from_arg_obj`, of arguments as they stand in a command."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LogitmillLM:
        """A model of arguments; `additional_config` is what the harness's own options say.

        An argument goes before an option, which has a value even where nobody gave one. A mistake
        among them ends the harness's command with a line and status 2.
        """
        options = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if options.get("device") == _DEFAULT_DEVICE and not torch.cuda.is_available():
            del options["device"]
        try:
            return cls(**{**options, **arg_dict})
        except ValueError as error:
            # The harness's command would show a traceback of what is a mistake in it.
            if not hasattr(sys.modules["__main__"], "cli_evaluate"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context and in front of a rolling document."""
        tokenizer = self.tokenizer
        for token in (self._prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("prefix_token_id: the tokenizer has neither BOS nor EOS; give a token id")

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the chat template by."""
        return self._pretrained.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text.

        Left to itself the tokenizer, or `add_bos_token`, decides what stands in front; never BOS
        where the text, a rendered chat say, begins with it.
        """
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        if add_special_tokens is None:
            return self._encode(string)
        return self._encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; without its system messages where the template refuses them."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_args,
            )

        try:
            return render(chat_history)
        except TemplateError as error:
            log.warning("the chat template refuses a chat (%s): system messages left out", error)
            return render([m for m in chat_history if m["role"] != "system"])

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context) in nats, and is it greedy.

        Raises:
            ValueError: for a continuation that is empty, longer than `max_length`, or no more than
                the end of a token that its context begins.
        """
        for i, request in enumerate(requests):
            if not request.args[1]:
                raise ValueError(f"continuation: of request {i} it is empty, so nothing is scored")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text: log p in nats, every token once, in windows of `max_length`."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for i, request in enumerate(tqdm(requests, "Tokenizing inputs", disable=disable_tqdm)):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (loglikelihood, _) in zip(owners, answers, strict=True):
            totals[owner] += loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with after each context, up to where the request ends it.

        Greedy unless `do_sample` is asked for; requests of equal settings run together, and a
        context that leaves no room is cut from the left.

        Raises:
            ValueError: for settings that are not known, or more tokens than `max_length` has.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        eos = self.tokenizer.eos_token
        wishes = {key: Wish.read(requests[of[0]].args[1], eos) for key, of in groups.items()}
        for wish in wishes.values():
            if wish.max_tokens >= self.max_length:
                raise ValueError(
                    f"max_gen_toks: {wish.max_tokens} leaves no room for a context in max_length, "
                    f"{self.max_length}; ask for fewer"
                )
        answers = [""] * len(requests)
        with tqdm(
            total=len(requests), desc="Running generate_until requests", disable=disable_tqdm
        ) as bar:
            for key, of in groups.items():
                for i, text in zip(
                    of, self._generate([requests[i].args[0] for i in of], wishes[key]), strict=True
                ):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        return answers

    def _generate(self, contexts: Sequence[str], wish: Wish) -> Iterator[str]:
        room = self.max_length - wish.max_tokens
        prompts = [
            (self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts
        ]
        # A token that was added to the vocabulary ends a text by its id: text leaves it out.
        added = self.tokenizer.get_added_vocab()
        ids = [added[text] for text in wish.stop_texts if text in added]
        texts = [text for text in wish.stop_texts if text not in added]
        for one in self._pipe.sample(
            prompts,
            wish.sampler,
            max_tokens=wish.max_tokens,
            stop=[*self._stop_ids, *ids, *texts],
            context=self.max_length,
        ):
            yield wish.cut(self.tokenizer.decode(one.ids.tolist(), skip_special_tokens=True))

    def get_model_info(self) -> dict[str, Any]:
        """What computed the numbers, for the harness's file of results."""
        return {
            "model_revision": self._revision,
            "model_dtype": self._pipe.dtype,
            "model_quantization": self._quantization,
            "model_device": self._pipe.device_name,
            "model_placement": self._pipe.placement,
            "model_versions": versions(),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        """Answers to requests of tokens, in their order."""
        # Of whitespace alone the harness leaves no token of a context.
        filled = [(key, context or [self.prefix_token_id], own) for key, context, own in requests]
        answers: list[Answer] = [(0.0, False)] * len(requests)
        with tqdm(
            total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm
        ) as bar:
            for which, answer in answer_requests(self._pipe, filled, self.max_length):
                for i in which:
                    answers[i] = answer
                    if (arguments := requests[i][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", arguments, answer)
                bar.update(len(which))
        return answers


def _load_tokenizer(
    source: str | Path,
    *,
    revision: str | None,
    trust_remote_code: bool,
    add_bos_token: bool | None,
) -> Any:
    """The tokenizer that the harness's own backend would use."""
    from transformers import AutoTokenizer

    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"tokenizer: none can be loaded from {str(source)!r}: {reason}") from None


register()

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
