"""Runs a spec over packed tokens, layer by layer, with no cache of keys and values.

Legend: T packed tokens, D hidden size, H query heads, G key/value heads, V vocabulary, R rows.

Everything but attention treats a row of tokens alone, so the linear parts run in blocks of rows
(`blocks.py`). Together with attention that sees one sequence at a time this keeps a document's
bits the same whatever it is packed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..kernels.activations import gate
from ..kernels.attention import attend
from ..kernels.norms import add_norm
from ..kernels.quantize import Activations, Layout, quantize
from ..kernels.rotary import rotate
from .blocks import LEAST, STANDARD, Blocks, agree, powers
from .formats import Linear
from .spec import DecoderSpec
from .transfer import to_device


@dataclass(frozen=True)
class LayerWeights:
    """What one layer multiplies by; queries, keys and values side by side, gate and up too."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass
class _Stream:
    """The residual stream of a batch on its way through the layers."""

    x_TD: torch.Tensor
    cos_TR: torch.Tensor
    sin_TR: torch.Tensor
    deltas: dict[int, torch.Tensor] = field(default_factory=dict)
    """What the last layer adds to each block of rows, by its first row; the next norm takes it."""

    def norm(self, weight_D: torch.Tensor, eps: float, layout: Layout, rows: slice) -> Activations:
        """Add what is pending to a block of rows and normalise it."""
        delta_TD = self.deltas.pop(rows.start, None)
        return add_norm(self.x_TD[rows], delta_TD, weight_D, eps, layout)


class Decoder:
    """A causal language model over packed tokens: ids -> hidden states -> logits."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        embedding_VD: torch.Tensor,
        layers: Sequence[LayerWeights],
        final_norm_D: torch.Tensor,
        head: Linear,
        block_rows: int,
    ) -> None:
        """`block_rows` bounds the rows of a product; on a CPU they are always `LEAST`."""
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.max_positions = spec.max_positions
        self.device = embedding_VD.device
        self.dtype = embedding_VD.dtype
        self.blocks = Blocks([LEAST])
        """Rows of the products of `hidden`."""
        self._embedding_VD = embedding_VD
        self._layers = layers
        self._final_norm_D = final_norm_D
        self._head = head
        self._rates: tuple[torch.Tensor, float] | None = None
        if self.device.type == "cuda":
            self.blocks = self._agree(_unlike(layers), block_rows)

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states after the final norm, [T, D].

        `ids_T` int64 on the device holds sequences of the given `lengths` one after another,
        padded with any valid id as `blocks` pads; rows of padding come out meaningless.
        """
        spec = self.spec
        cos_TR, sin_TR = self._angles(len(ids_T), lengths)
        stream = _Stream(self._embedding_VD[ids_T], cos_TR, sin_TR)
        num_queries, num_turned = spec.num_heads, spec.num_heads + spec.num_kv_heads
        for layer, window in zip(self._layers, spec.windows, strict=True):
            heads_THD = self._by_block(len(ids_T), partial(self._project, layer, stream))
            mixed_THD = attend(
                heads_THD[:, :num_queries],
                heads_THD[:, num_queries:num_turned],
                heads_THD[:, num_turned:],
                lengths,
                scale=spec.head_dim**-0.5,
                window=window,
            )
            del heads_THD
            for rows in self.blocks.cut(len(ids_T)):
                stream.deltas[rows.start] = self._feed_forward(layer, stream, mixed_THD, rows)
            del mixed_THD
        return self._by_block(len(ids_T), partial(self._finish, stream))

    def _project(self, layer: LayerWeights, stream: _Stream, rows: slice) -> torch.Tensor:
        """Queries and keys, turned, and values of a block of rows; [rows, heads, head size]."""
        spec = self.spec
        normed = stream.norm(layer.attention_norm, spec.norm_eps, layer.qkv.layout, rows)
        heads_THD = layer.qkv(normed).unflatten(1, (-1, spec.head_dim))
        rotate(
            heads_THD[:, : spec.num_heads + spec.num_kv_heads],
            stream.cos_TR[rows],
            stream.sin_TR[rows],
            num_queries=spec.num_heads,
            q_norm_D=layer.q_norm,
            k_norm_D=layer.k_norm,
            eps=spec.norm_eps,
        )
        return heads_THD

    def _feed_forward(
        self, layer: LayerWeights, stream: _Stream, mixed_THD: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """From attention's result to what the layer adds last, for a block of rows; [rows, D]."""
        spec = self.spec
        mixed = layer.output(quantize(mixed_THD[rows].flatten(1), layer.output.layout))
        normed = add_norm(
            stream.x_TD[rows], mixed, layer.mlp_norm, spec.norm_eps, layer.gate_up.layout
        )
        return layer.down(gate(layer.gate_up(normed), spec.activation, layer.down.layout))

    def _finish(self, stream: _Stream, rows: slice) -> torch.Tensor:
        normed = stream.norm(self._final_norm_D, self.spec.norm_eps, Layout.PLAIN, rows)
        return normed.values_TK

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of rows of hidden states, float32 [R, V]."""
        return self._head(quantize(hidden_RD, self._head.layout))

    def agree_on_logits(self, most_rows: int) -> Blocks:
        """Numbers of rows, up to `most_rows`, for which `logits` gives a row the same bits."""
        # How much memory logits may take must not decide a bit: the fewest rows always fit.
        return self._agree([(self._head, self.spec.hidden_size)], most_rows, LEAST)

    def _agree(
        self, linears: Sequence[tuple[Linear, int]], most_rows: int, standard: int = STANDARD
    ) -> Blocks:
        products = [(partial(_multiply, linear), num_columns) for linear, num_columns in linears]
        return agree(
            products, powers(most_rows), dtype=self.dtype, device=self.device, standard=standard
        )

    def _by_block(self, num_rows: int, compute: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """compute(rows) of every block of rows, one below the other; one block is not copied."""
        blocks = self.blocks.cut(num_rows)
        first = compute(blocks[0])
        if len(blocks) == 1:
            return first
        out = first.new_empty(num_rows, *first.shape[1:])
        out[blocks[0]] = first
        for rows in blocks[1:]:
            out[rows] = compute(rows)
        return out

    def _angles(self, num_rows: int, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every packed token's angles, float32 [T, rotary dim / 2] each."""
        rotary = self.spec.rotary
        count = np.asarray(lengths)
        positions_T = np.zeros(num_rows, np.float32)
        used = int(count.sum())
        starts = np.repeat(np.cumsum(count) - count, count)
        positions_T[:used] = np.arange(used) - starts
        if rotary.depends_on_length:
            tables = [rotary.frequencies(n) for n in lengths]
            rates_SR = to_device(torch.stack([rates for rates, _ in tables]), self.device)
            sequence_T = np.zeros(num_rows, np.int64)
            sequence_T[:used] = np.repeat(np.arange(len(count)), count)
            rates_TR = rates_SR[to_device(torch.from_numpy(sequence_T), self.device)]
            factor = tables[0][1]
        else:
            if self._rates is None:
                rates, factor = rotary.frequencies(0)
                self._rates = (rates[None].to(self.device), factor)
            rates_TR, factor = self._rates
        angles_TR = to_device(torch.from_numpy(positions_T), self.device)[:, None] * rates_TR
        return angles_TR.cos() * factor, angles_TR.sin() * factor


def _unlike(layers: Sequence[LayerWeights]) -> list[tuple[Linear, int]]:
    """Linears of unlike kinds or shapes, and how many columns each takes."""
    found: dict[tuple[object, ...], tuple[Linear, int]] = {}
    for layer in layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            has_bias = getattr(linear, "bias_N", None) is not None
            kind = (type(linear), linear.layout, has_bias, *linear.shape)
            found.setdefault(kind, (linear, linear.shape[1]))
    return list(found.values())


def _multiply(linear: Linear, x_MK: torch.Tensor) -> torch.Tensor:
    return linear(quantize(x_MK, linear.layout))
