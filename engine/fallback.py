"""Any other causal LM of transformers: slower, the same records.

The model's own code runs each sequence alone, unpadded. Its head runs afterwards over chunks of
hidden states, through the model's own wrapper, so that what the wrapper does to logits (scaling,
soft caps) is done and the logits of a whole document never exist.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .blocks import LEAST, Blocks
from .checkpoint import is_finite

log = logging.getLogger(__name__)

NO_LIMIT = 1 << 30
"""`max_positions` of a model that states none."""
# Tokens that tell whether a model sees what comes later.
_PROBE = 8
# Model types whose config has `is_decoder` and whose code does not look at it.
_DECODERS_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


class Fallback:
    """A transformers model behind the faces of `Decoder`."""

    def __init__(self, model: Any, *, vocab_size: int, max_positions: int):
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.blocks = Blocks([LEAST])
        self.is_streamed = False
        self.dtype = torch.float32
        self.hidden_size = None
        self.head_digest = None
        self.hidden_of_tree = None
        self.device = next(model.parameters()).device
        self._model = model
        self._body = _find_body(model, self.device)
        self._output_type: type | None = None
        self._widen_head()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> Fallback:
        """Load a model folder through `AutoModelForCausalLM`.

        Raises:
            ValueError: if transformers does not know the model, or needs its own code to be run.
        """
        from transformers import AutoModelForCausalLM

        config = _read(folder, trust_remote_code)
        with _plain_errors(folder):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                # transformers' other implementations leave soft caps out.
                attn_implementation="eager" if _caps_scores(config) else None,
            )
        model, found = loaded
        _check_found(folder, model, found)
        for name, weight in model.named_parameters():
            if not is_finite(weight):
                raise ValueError(f"model: tensor {name} of {folder} holds NaN or infinite weights")
        log.warning(
            "%s has no native spec: it runs through transformers, slower, with the same records",
            type(model).__name__,
        )
        fallback = cls(
            model.to(device).eval(),
            vocab_size=model.get_output_embeddings().weight.shape[0],
            max_positions=_max_positions(config),
        )
        fallback._check_causal()
        return fallback

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states after the final norm, float32 [T, D]; as `Decoder.hidden`."""
        parts = []
        start = 0
        for length in lengths:
            ids = ids_T[None, start : start + length]
            output = self._body(input_ids=ids, use_cache=False)
            self._output_type = type(output)
            parts.append(output.last_hidden_state[0].float())
            start += length
        parts.append(parts[0].new_zeros(len(ids_T) - start, parts[0].shape[1]))
        return torch.cat(parts)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of rows of hidden states, float32 [R, V], by the model's own wrapper."""
        assert self._output_type is not None, "hidden states come from `hidden`"
        output = self._output_type(last_hidden_state=hidden_RD[None])
        ids = torch.zeros(1, len(hidden_RD), dtype=torch.long, device=hidden_RD.device)
        forward = self._body.forward
        self._body.forward = lambda *args, **kwargs: output
        try:
            return self._model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            self._body.forward = forward

    def agree_on_logits(self, most_rows: int, least: int) -> Blocks:
        """One number of rows, for which nothing has to be tried."""
        return Blocks([least])

    def _check_causal(self) -> None:
        """ValueError if a token's hidden states change with the tokens that come later.

        transformers loads encoders, too, as causal models.
        """
        ids_T = torch.arange(_PROBE, device=self.device) % self.vocab_size
        others_T = torch.cat([ids_T[:1], (ids_T[1:] + _PROBE) % self.vocab_size])
        with torch.inference_mode():
            first, other = (self.hidden(ids, [_PROBE])[0] for ids in (ids_T, others_T))
        # Experts that share rows otherwise may round otherwise.
        rounding = max(1e-3, 2.5 * torch.finfo(self._model.dtype).eps)
        if (first - other).abs().max() > rounding * first.abs().max():
            raise ValueError(_not_causal(self._model))

    def _widen_head(self) -> None:
        """Give the model a float32 head of its own: narrow logits are no source of a score."""
        head = self._model.get_output_embeddings()
        if head.weight.dtype == torch.float32:
            return
        wide = nn.Linear(head.in_features, head.out_features, head.bias is not None)
        wide.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
        self._model.set_output_embeddings(wide.to(self.device))


class _Called(Exception):
    """A module has been called."""


def _find_body(model: Any, device: torch.device) -> Any:
    """What the model's own forward calls for hidden states; ValueError if it cannot be told."""
    base = model.base_model
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)

    def tell(*args: Any) -> None:
        raise _Called

    for body in (base, getattr(base, "decoder", None)):
        if body is None or body is model:
            continue
        hook = body.register_forward_pre_hook(tell)
        try:
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
        except _Called:
            return body
        finally:
            hook.remove()
    raise ValueError(
        f"model: {type(model).__name__} has no body apart from its head, so its logits "
        "cannot be computed in bounded memory"
    )


def _caps_scores(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def read_sizes(folder: Path, *, trust_remote_code: bool) -> tuple[int, int]:
    """(vocab_size, max_positions) as the model folder's config says; errors as in `load`."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _read(folder, trust_remote_code)
    own = getattr(config, "auto_map", None) or {}
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size is None or not (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
    ):
        raise ValueError(
            f"model: {folder} holds a {config.model_type}, which transformers does not run as a "
            "causal language model"
        )
    return vocab_size, _max_positions(config)


def check_model(folder: Path, *, trust_remote_code: bool) -> None:
    """Make the model without weights.

    Raises:
        ValueError: if transformers cannot, as in `load`, or if the model is known as an encoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = _read(folder, trust_remote_code)
    with _plain_errors(folder), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # A decoder of its own class has said so in its config when it was made.
    is_encoder = getattr(model.config, "is_decoder", None) is False
    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if is_encoder and is_known and config.model_type not in _DECODERS_ANYWAY:
        raise ValueError(_not_causal(model))


def check_tensors(folder: Path, *, trust_remote_code: bool) -> None:
    """Hold the headers of files against the model, where `can_check_tensors`.

    Raises:
        ValueError: naming a tensor that is missing or misshapen, as in `load`.
    """
    from transformers import AutoModelForCausalLM

    if not can_check_tensors():
        return
    with _plain_errors(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_found(folder, *loaded)


def can_check_tensors() -> bool:
    """Whether transformers can load without memory for weights, for which it wants accelerate."""
    from transformers.utils import is_accelerate_available

    return is_accelerate_available()


def _check_found(folder: Path, model: Any, found: Mapping[str, Any]) -> None:
    """ValueError for tensors that transformers has made up; a warning for what it left out."""
    misshapen = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    wrong = sorted([*found["missing_keys"], *misshapen])
    if wrong:
        raise ValueError(
            f"model: {len(wrong)} tensors of {folder} are missing or have another shape than "
            f"the config calls for, the first is {wrong[0]}"
        )
    left = sorted(found["unexpected_keys"])
    if left:
        log.warning(
            "model: %d tensors of %s have no place in %s and are left out, the first is %s",
            *(len(left), folder, type(model).__name__, left[0]),
        )


def _not_causal(model: Any) -> str:
    return (
        f"model: {type(model).__name__} sees tokens that come later, so it is no causal language "
        "model and has no log-probability of a text"
    )


def _max_positions(config: Any) -> int:
    text = config.get_text_config()
    stated = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((n for n in stated if n), NO_LIMIT)


def _read(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with _plain_errors(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """What transformers raises while loading, as a ValueError that says what would work.

    What it shows besides (bars, reports in colour) is for its own users, and stays away.
    """
    try:
        with _hushed():
            yield
    except Exception as error:  # whatever the model's own code raises
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"trust_remote_code: {folder} brings its own Python code; pass "
                "trust_remote_code=True if you have read it and trust it"
            ) from None
        # A KeyError's message is the key alone.
        said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"model: transformers cannot load {folder}: {said}") from error


@contextmanager
def _hushed() -> Iterator[None]:
    from transformers.utils import logging as theirs

    level, had_bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if had_bars:
            theirs.enable_progress_bar()
