"""Runs a spec over packed tokens, layer by layer, with no cache of keys and values.

Legend: T packed tokens, D hidden size, H query heads, G key/value heads, V vocabulary, R rows.

Everything but attention treats a row of tokens alone, so the linear parts run in blocks of rows
(`blocks.py`). Together with attention that sees one sequence at a time this keeps a document's
bits the same whatever it is packed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol, cast

import numpy as np
import torch

from ..kernels.activations import gate
from ..kernels.attention import attend
from ..kernels.norms import NormWeights, add_norm
from ..kernels.quantize import Activations, Layout, quantize
from ..kernels.rotary import rotate
from ..kernels.tree_attention import (
    LEAST_ROWS,
    TreeAttention,
    can_attend,
    most_rows,
    products,
)
from .blocks import LEAST, STANDARD, Blocks, agree, powers
from .experts import SparseExperts
from .formats import Linear
from .hooks import Hook, PackedTokens, apply
from .latent import LatentProjection
from .placement import Arrangement
from .prefixes import Tree
from .replay import digest
from .residency import Layers, bring
from .spec import DecoderSpec, Rotary
from .transfer import to_device


class Part(Protocol):
    """What a layer does to each token alone: a dense feed-forward, or experts."""

    @property
    def layout(self) -> Layout:
        """How it takes its input."""
        ...

    @property
    def linears(self) -> Sequence[Linear]:
        """Its products of all rows, whose bits may go by the number of rows."""
        ...

    def __call__(self, x: Activations) -> torch.Tensor: ...


@dataclass(frozen=True)
class DenseFeedForward:
    """down(activation(gate) * up), or down(activation(up)) where it is not `gated`."""

    up: Linear
    """Gate and up side by side, where it is gated."""
    down: Linear
    activation: str
    gated: bool

    @property
    def layout(self) -> Layout:
        return self.up.layout

    @property
    def linears(self) -> Sequence[Linear]:
        return (self.up, self.down)

    def __call__(self, x: Activations) -> torch.Tensor:
        return self.down(gate(self.up(x), self.activation, self.down.layout, gated=self.gated))


@dataclass(frozen=True)
class SparseFeedForward:
    """Experts that a router chooses for each token."""

    experts: SparseExperts
    layout = Layout.PLAIN

    @property
    def linears(self) -> Sequence[Linear]:
        return self.experts.shared or ()

    def __call__(self, x: Activations) -> torch.Tensor:
        return self.experts(x.values_TK)


class Projection(Protocol):
    """From normed activations to query, key and value heads: a linear, or one through latents."""

    @property
    def layout(self) -> Layout: ...

    def __call__(self, x: Activations) -> torch.Tensor: ...


@dataclass(frozen=True)
class LayerWeights:
    """What one layer multiplies by; queries, keys and values side by side."""

    attention_norm: NormWeights | None
    qkv: Projection
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    sinks_H: torch.Tensor | None
    output: Linear
    attention_post_norm: NormWeights | None
    mlp_norm: NormWeights | None
    feed_forward: Part
    mlp_post_norm: NormWeights | None


@dataclass
class _Stream:
    """The residual stream of a batch on its way through the layers."""

    x_TD: torch.Tensor
    blocks: Sequence[slice]
    """Rows of the products."""
    scale: float
    """What is added is multiplied by it."""
    angles: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Cosine and sine of every token, float32 [T, R] each, for each of the model's rotaries."""
    deltas: dict[int, torch.Tensor] = field(default_factory=dict)
    """What the last layer adds to each block of rows, by its first row; the next norm takes it."""

    def norm(self, weights: NormWeights | None, layout: Layout, rows: slice) -> Activations:
        """Add what is pending to a block of rows and normalise it."""
        return self.add(self.deltas.pop(rows.start, None), weights, layout, rows)

    def add(
        self,
        delta_TD: torch.Tensor | None,
        weights: NormWeights | None,
        layout: Layout,
        rows: slice,
    ) -> Activations:
        """Add to a block of rows and normalise it."""
        return add_norm(self.x_TD[rows], delta_TD, weights, layout, scale=self.scale)

    def sum(self) -> torch.Tensor:
        """A copy of the stream with what is pending, [T, D], as the next norm would store it."""
        sums_TD = self.x_TD.clone()
        for rows in self.blocks:
            delta_TD = self.deltas.get(rows.start)
            add_norm(sums_TD[rows], delta_TD, None, Layout.PLAIN, scale=self.scale)
        return sums_TD

    def replace(self, states_TD: torch.Tensor) -> None:
        """Go on with other states in the first rows; nothing is pending then."""
        self.x_TD = self.sum()
        self.x_TD[: len(states_TD)] = states_TD
        self.deltas.clear()


class Decoder:
    """A causal language model over packed tokens: ids -> hidden states -> logits."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        embedding_VD: torch.Tensor,
        layers: Layers[LayerWeights],
        positions_PD: torch.Tensor | None,
        final_norm: NormWeights,
        head: Linear,
        arrangement: Arrangement | None,
    ) -> None:
        """On a CPU products are of `LEAST` rows, whatever else is arranged."""
        self.spec = spec
        self.arrangement = arrangement
        """Where layers live, and how much runs at a time."""
        self.is_streamed = arrangement is not None and arrangement.placement.is_streamed
        self.vocab_size = spec.vocab_size
        self.hidden_size = spec.hidden_size
        self.max_positions = spec.max_positions
        self.device = embedding_VD.device
        self.dtype = embedding_VD.dtype
        self.blocks = Blocks([LEAST])
        """Rows of the products of `hidden`."""
        self.hooks: list[Hook] = []
        """What sees every layer's states, in order, and may replace them."""
        self._embedding_VD = embedding_VD
        self._positions_PD = positions_PD
        self._layers = layers
        self._final_norm = final_norm
        self._head = head
        self._rotaries: list[Rotary] = []
        for layer in spec.layers:
            if layer.rotary is not None and layer.rotary not in self._rotaries:
                self._rotaries.append(layer.rotary)
        self._rates: dict[int, tuple[torch.Tensor, float]] = {}
        if arrangement is not None and self.device.type != "cpu":
            standard = next((n for n in powers(STANDARD) if arrangement.allows(n)), LEAST)
            blocks = self._agree(
                _unlike(layers.held), powers(max(arrangement.block_rows, standard)), standard
            )
            self.blocks = blocks.limit(arrangement.block_rows)

    def hidden(
        self,
        ids_T: torch.Tensor,
        lengths: Sequence[int],
        attend: Callable[..., torch.Tensor] = attend,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [T, D].

        `ids_T` int64 on the device holds sequences of the given `lengths` one after another,
        padded with any valid id as `blocks` pads; rows of padding come out meaningless. `attend`
        stands for `kernels.attention.attend`, layer by layer.

        Raises:
            ValueError: for a sequence longer than a table of positions.
            RuntimeError: for one that takes more memory than was set.
        """
        positions_T, sequence_T = _place(lengths, len(ids_T))
        angles = [
            self._turn(i, positions_T, sequence_T, lengths) for i, _ in enumerate(self._rotaries)
        ]
        num_tokens = sum(lengths)
        tokens = PackedTokens(ids_T[:num_tokens], positions_T[:num_tokens], sequence_T[:num_tokens])
        attending = partial(attend, lengths=lengths)
        return self._run(ids_T, num_tokens, positions_T, angles, attending, tokens)

    def hidden_of_last(
        self, ids_S: torch.Tensor, lengths: Sequence[int], attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states after the final norm of the last tokens of sequences, [S, D].

        `attend` knows the keys and values of those before. `ids_S` may be padded; rows are one
        block, and a row's last bits may depend on their number.

        Args:
            ids_S: int64 on the device, one of each sequence.
            lengths: of each sequence, its last token included.
        """
        positions_S, sequence_S = np.zeros((2, len(ids_S)), np.int64)
        positions_S[: len(lengths)] = np.asarray(lengths) - 1
        sequence_S[: len(lengths)] = np.arange(len(lengths))
        angles = [
            self._turn(i, positions_S, sequence_S, lengths) for i, _ in enumerate(self._rotaries)
        ]
        tokens = PackedTokens(
            ids_S[: len(lengths)], positions_S[: len(lengths)], sequence_S[: len(lengths)]
        )
        return self._run(
            ids_S, len(lengths), positions_S, angles, attend, tokens, [slice(0, len(ids_S))]
        )

    def rates_agree(self, length: int, other: int) -> bool:
        """Whether keys of a sequence of one length are those of another length: they turn alike."""
        return all(
            torch.equal(rotary.frequencies(length)[0], rotary.frequencies(other)[0])
            for rotary in self._rotaries
            if rotary.depends_on_length
        )

    @property
    def hidden_of_tree(self) -> Callable[[torch.Tensor, Tree], torch.Tensor] | None:
        """The function of a tree's ids, padded as for `hidden`, and the tree: its rows' states.

        A sequence's own come out the same whatever it shares. None where a token's state goes by
        what comes after it, as the length of its sequence, or there is no attention for it, or
        hooks want to see whole sequences.
        """
        spec = self.spec
        if self.hooks or any(rotary.depends_on_length for rotary in self._rotaries):
            return None
        return self._hidden_of_tree if can_attend(self.device, self.dtype, spec.head_dim) else None

    def _hidden_of_tree(self, ids_T: torch.Tensor, tree: Tree) -> torch.Tensor:
        positions_T = np.zeros(len(ids_T), np.int64)
        positions_T[: len(tree.positions)] = tree.positions
        angles = [self._turn(i, positions_T) for i, _ in enumerate(self._rotaries)]
        attend = partial(TreeAttention(tree.branches, self.device), rows=self._tree_rows)
        return self._run(ids_T, len(tree.ids), positions_T, angles, attend)

    @cached_property
    def _tree_rows(self) -> Blocks | None:
        """Rows of the products of a tree's attention on a CPU."""
        if self.device.type != "cpu":
            return None
        spec = self.spec
        most = most_rows(spec.num_heads, spec.num_kv_heads)
        return agree(
            products(spec.head_dim),
            powers(most, LEAST_ROWS),
            dtype=torch.float32,
            device=self.device,
            standard=most,
        )

    def _run(
        self,
        ids_T: torch.Tensor,
        num_tokens: int,
        positions_T: np.ndarray,
        angles: Sequence[tuple[torch.Tensor, torch.Tensor]],
        attend: Callable[..., torch.Tensor],
        tokens: PackedTokens | None = None,
        blocks: Sequence[slice] | None = None,
    ) -> torch.Tensor:
        """All layers; `attend` takes queries, keys and values of all rows.

        Hooks see the states of `tokens`, which are the first rows. Products are of `blocks`, or
        of those of `self.blocks`.
        """
        spec = self.spec
        blocks = blocks or self._cut(len(ids_T), num_tokens)
        stream = _Stream(self._embed(ids_T, positions_T), blocks, spec.residual_scale, angles)
        num_queries, num_turned = spec.num_heads, spec.num_heads + spec.num_kv_heads
        for i, layer in enumerate(self._layers):
            heads_THD = self._project(i, layer, stream)
            mixed_THD = attend(
                heads_THD[:, :num_queries],
                heads_THD[:, num_queries:num_turned],
                heads_THD[:, num_turned:],
                scale=spec.scale,
                window=spec.layers[i].window,
                soft_cap=spec.soft_cap,
                sinks_H=layer.sinks_H,
            )
            del heads_THD
            if spec.value_dim != spec.head_dim:
                mixed_THD = mixed_THD[..., : spec.value_dim]
            for rows in blocks:
                stream.deltas[rows.start] = self._feed_forward(layer, stream, mixed_THD, rows)
            del mixed_THD
            if self.hooks and tokens is not None:
                changed = apply(self.hooks, i, stream.sum()[: len(tokens.ids_T)], tokens)
                if changed is not None:
                    stream.replace(changed)
        return self._finish(stream)

    def _cut(self, num_rows: int, num_tokens: int) -> list[slice]:
        """Blocks of rows, smaller ones where a long window leaves no room for large ones.

        `num_rows` are those of `num_tokens` with their padding.
        """
        blocks = self.blocks
        while self.arrangement and not self.arrangement.holds(
            num_tokens, num_rows, blocks.sizes[0]
        ):
            smaller = blocks.shrink()
            if smaller is None:
                raise self.arrangement.refuse(num_tokens, num_rows, blocks.sizes[0])
            blocks = smaller
        return blocks.cut(num_rows)

    def _embed(self, ids_T: torch.Tensor, positions_T: np.ndarray) -> torch.Tensor:
        x_TD = self._embedding_VD[ids_T]
        if self.spec.embedding_scale is not None:
            x_TD *= torch.tensor(self.spec.embedding_scale, dtype=self.dtype).item()
        if self._positions_PD is not None:
            longest = int(positions_T.max()) + 1
            if longest > len(self._positions_PD):
                raise ValueError(
                    f"input_ids: a sequence of {longest} tokens is longer than the "
                    f"{len(self._positions_PD)} positions that the model has; use a shorter context"
                )
            x_TD += self._positions_PD[to_device(torch.from_numpy(positions_T), self.device)]
        return x_TD

    def _project(self, i: int, layer: LayerWeights, stream: _Stream) -> torch.Tensor:
        """Queries and keys, turned, and values of all rows; [T, heads, head size]."""
        spec = self.spec
        num_turned = spec.num_heads + spec.num_kv_heads
        out_THD: torch.Tensor | None = None
        for rows in stream.blocks:
            normed = stream.norm(layer.attention_norm, layer.qkv.layout, rows)
            heads_THD = layer.qkv(normed).unflatten(1, (-1, spec.head_dim))
            if len(stream.blocks) == 1:
                self._turn_heads(i, layer, stream, rows, heads_THD, None)
                return heads_THD
            if out_THD is None:
                out_THD = heads_THD.new_empty(len(stream.x_TD), *heads_THD.shape[1:])
            self._turn_heads(i, layer, stream, rows, heads_THD, out_THD[rows])
            out_THD[rows, num_turned:] = heads_THD[:, num_turned:]
        assert out_THD is not None
        return out_THD

    def _turn_heads(
        self,
        i: int,
        layer: LayerWeights,
        stream: _Stream,
        rows: slice,
        heads_THD: torch.Tensor,
        out_THD: torch.Tensor | None,
    ) -> None:
        """Normalise and turn queries and keys of a block of rows into `out`, or in place."""
        spec, rotary = self.spec, self.spec.layers[i].rotary
        num_queries, num_turned = spec.num_heads, spec.num_heads + spec.num_kv_heads
        q_norm, k_norm = layer.q_norm, layer.k_norm
        if spec.qk_norm_of_row:
            for part, norm in (
                (heads_THD[:, :num_queries], q_norm),
                (heads_THD[:, num_queries:num_turned], k_norm),
            ):
                assert norm is not None
                normed = add_norm(part.flatten(1).contiguous(), None, norm, Layout.PLAIN)
                part.copy_(normed.values_TK.view(part.shape))
            q_norm = k_norm = None
        if rotary is None:
            cos_TR = sin_TR = torch.empty(rows.stop, 0, device=self.device)
        else:
            cos_TR, sin_TR = stream.angles[self._rotaries.index(rotary)]
        if rotary is not None or q_norm is not None or out_THD is not None:
            rotate(
                heads_THD[:, :num_turned],
                cos_TR[rows],
                sin_TR[rows],
                num_queries=num_queries,
                q_norm=q_norm,
                k_norm=k_norm,
                out_THD=None if out_THD is None else out_THD[:, :num_turned],
            )

    def _feed_forward(
        self, layer: LayerWeights, stream: _Stream, mixed_THD: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """From attention's result to what the layer adds last, for a block of rows; [rows, D]."""
        feed_forward = layer.feed_forward
        mixed = layer.output(quantize(mixed_THD[rows].flatten(1), layer.output.layout))
        if layer.attention_post_norm is not None:
            mixed = add_norm(mixed, None, layer.attention_post_norm, Layout.PLAIN).values_TK
        if self.spec.parallel:
            norm = layer.attention_norm if self.spec.shared_norm else layer.mlp_norm
            added = feed_forward(stream.add(None, norm, feed_forward.layout, rows))
            return added.add_(mixed)
        added = feed_forward(stream.add(mixed, layer.mlp_norm, feed_forward.layout, rows))
        if layer.mlp_post_norm is not None:
            added = add_norm(added, None, layer.mlp_post_norm, Layout.PLAIN).values_TK
        return added

    def _finish(self, stream: _Stream) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]."""
        normed = (stream.norm(self._final_norm, Layout.PLAIN, rows) for rows in stream.blocks)
        if len(stream.blocks) == 1:
            return next(normed).values_TK
        out_TD = torch.empty_like(stream.x_TD)
        for rows, block in zip(stream.blocks, normed, strict=True):
            out_TD[rows] = block.values_TK
        return out_TD

    @contextmanager
    def hooked(self, hook: Hook) -> Iterator[None]:
        """A block in which a hook is the last to see what there is after each layer."""
        self.hooks.append(hook)
        try:
            yield
        finally:
            self.hooks.remove(hook)

    def normalise(self, states_RD: torch.Tensor) -> torch.Tensor:
        """The final norm of rows of the residual stream, [R, D], as `hidden` does it last."""
        return add_norm(states_RD, None, self._final_norm, Layout.PLAIN).values_TK

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of rows of hidden states, float32 [R, V]."""
        logits_RV = self._head(quantize(hidden_RD, self._head.layout))
        if self.spec.logit_scale != 1.0:
            logits_RV *= self.spec.logit_scale
        if self.spec.logit_cap is not None:
            logits_RV.div_(self.spec.logit_cap).tanh_().mul_(self.spec.logit_cap)
        return logits_RV

    @cached_property
    def head_digest(self) -> str:
        """sha256 of all that `logits` makes logits of hidden states with."""
        return digest(self._head, self.spec.logit_scale, self.spec.logit_cap)

    def agree_on_logits(self, most_rows: int, least: int) -> Blocks:
        """Numbers of rows from `least` up to `most_rows` for which `logits` gives the same bits."""
        return self._agree([(self._head, self.spec.hidden_size)], powers(most_rows, least), least)

    def _agree(
        self, linears: Sequence[tuple[Linear, int]], sizes: Sequence[int], standard: int
    ) -> Blocks:
        multiply = partial(_multiply, self.device)
        products = [(partial(multiply, linear), num_columns) for linear, num_columns in linears]
        return agree(products, sizes, dtype=self.dtype, device=self.device, standard=standard)

    def _turn(
        self,
        i: int,
        positions_T: np.ndarray,
        sequence_T: np.ndarray | None = None,
        lengths: Sequence[int] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every token's angles in a rotary, float32 [T, rotary dim / 2] each.

        Sequences and lengths are asked of a rotary that depends on them.
        """
        rotary = self._rotaries[i]
        if rotary.depends_on_length:
            assert sequence_T is not None
            tables = [rotary.frequencies(n) for n in lengths]
            rates_SR = to_device(torch.stack([rates for rates, _ in tables]), self.device)
            rates_TR = rates_SR[to_device(torch.from_numpy(sequence_T), self.device)]
            factor = tables[0][1]
        else:
            if i not in self._rates:
                rates, factor = rotary.frequencies(0)
                self._rates[i] = (rates[None].to(self.device), factor)
            rates_TR, factor = self._rates[i]
        at_T = to_device(torch.from_numpy(positions_T.astype(np.float32)), self.device)
        angles_TR = at_T[:, None] * rates_TR
        return angles_TR.cos() * factor, angles_TR.sin() * factor


def _place(lengths: Sequence[int], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Every row's place in its sequence, and its sequence, int64 [T] each; padding has zeros."""
    count = np.asarray(lengths)
    used = int(count.sum())
    positions_T, sequence_T = np.zeros((2, num_rows), np.int64)
    positions_T[:used] = np.arange(used) - np.repeat(np.cumsum(count) - count, count)
    sequence_T[:used] = np.repeat(np.arange(len(count)), count)
    return positions_T, sequence_T


def _unlike(layers: Sequence[LayerWeights]) -> list[tuple[Linear, int]]:
    """Linears of unlike kinds or shapes, and how many columns each takes."""
    found: dict[tuple[object, ...], tuple[Linear, int]] = {}
    for layer in layers:
        qkv = layer.qkv
        projected = qkv.linears if isinstance(qkv, LatentProjection) else [cast(Linear, qkv)]
        for linear in (*projected, layer.output, *layer.feed_forward.linears):
            has_bias = getattr(linear, "bias_N", None) is not None
            kind = (type(linear), linear.layout, has_bias, *linear.shape)
            found.setdefault(kind, (linear, linear.shape[1]))
    return list(found.values())


def _multiply(device: torch.device, linear: Linear, x_MK: torch.Tensor) -> torch.Tensor:
    # What is streamed lies in host memory, and its turn in a slot is another one.
    return bring(linear, device)(quantize(x_MK, linear.layout))
