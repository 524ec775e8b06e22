"""Runs a spec over packed tokens, layer by layer, with no cache of keys and values.

Legend: T packed tokens, D hidden size, H query heads, G key/value heads, V vocabulary, R rows.

Everything but attention treats a row of tokens alone, so the linear parts run in blocks of rows,
each a multiple of `ROW_MULTIPLE`. Together with attention that sees one sequence at a time this
keeps a document's bits the same whatever it is packed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..kernels import linear
from ..kernels.activations import gate
from ..kernels.attention import attend
from ..kernels.norms import add_norm
from ..kernels.quantize import Activations, Layout, quantize
from ..kernels.rotary import rotate
from .formats import Linear
from .spec import DecoderSpec
from .transfer import to_device

ROW_MULTIPLE = 512
"""Rows of every product are a multiple of this: from here on the libraries of GPUs keep a row's
bits whatever the number of rows (`infra/benchmarks/`)."""


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
    delta_TD: torch.Tensor | None
    """What the last layer adds and the next norm takes in."""
    cos_TR: torch.Tensor
    sin_TR: torch.Tensor

    def norm(self, weight_D: torch.Tensor, eps: float, layout: Layout, rows: slice) -> Activations:
        """Add what is pending to a block of rows and normalise it."""
        delta_TD = self.delta_TD[rows] if self.delta_TD is not None else None
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
        head_VD: torch.Tensor,
        block_rows: int,
    ) -> None:
        self.spec = spec
        self.vocab_size = spec.vocab_size
        self.max_positions = spec.max_positions
        self.device = embedding_VD.device
        self.dtype = embedding_VD.dtype
        self.row_multiple = ROW_MULTIPLE
        self.block_rows = block_rows
        """Most rows of a matrix product, a multiple of `row_multiple`."""
        self._embedding_VD = embedding_VD
        self._layers = layers
        self._final_norm_D = final_norm_D
        self._head_VD = head_VD
        self._rates: tuple[torch.Tensor, float] | None = None

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states after the final norm, [T, D].

        `ids_T` int64 on the device holds sequences of the given `lengths` one after another,
        padded with any valid id to a multiple of `row_multiple`; rows of padding come out
        meaningless.
        """
        spec = self.spec
        cos_TR, sin_TR = self._angles(len(ids_T), lengths)
        stream = _Stream(self._embedding_VD[ids_T], None, cos_TR, sin_TR)
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
            stream.delta_TD = self._by_block(
                len(ids_T), partial(self._feed_forward, layer, stream, mixed_THD)
            )
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
        return linear.multiply_wide(hidden_RD, self._head_VD)

    def _by_block(self, num_rows: int, compute: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """compute(rows) of every block of rows, one below the other; one block is not copied."""
        first = compute(slice(0, self.block_rows))
        if num_rows <= self.block_rows:
            return first
        out = first.new_empty(num_rows, *first.shape[1:])
        out[: self.block_rows] = first
        for start in range(self.block_rows, num_rows, self.block_rows):
            rows = slice(start, start + self.block_rows)
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
