"""Runs a spec over packed tokens, layer by layer, with no cache of keys and values.

Legend: T packed tokens, D hidden size, H query heads, G key/value heads, V vocabulary, R rows.

Everything but attention treats a row of tokens alone, so the linear parts run in blocks of a
fixed number of rows. Together with attention that sees one sequence at a time this keeps a
document's bits the same whatever it is packed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..kernels import linear
from ..kernels.activations import gate
from ..kernels.attention import attend
from ..kernels.norms import rms_norm
from ..kernels.rotary import rotate
from .checkpoint import Checkpoint
from .families import Family, Slice
from .formats import Dense, Linear
from .spec import DecoderSpec


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
        self.block_rows = block_rows
        """Rows of every matrix product; a batch is padded to a multiple of it."""
        self._embedding_VD = embedding_VD
        self._layers = layers
        self._final_norm_D = final_norm_D
        self._head_VD = head_VD

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        family: Family,
        *,
        device: torch.device,
        dtype: torch.dtype,
        block_rows: int,
    ) -> Decoder:
        """Read a checkpoint into `dtype` on `device`.

        Raises:
            ValueError: naming the tensor that is missing, misshapen, not finite or left over.
        """
        spec = family.spec(checkpoint.config)
        d, q, kv, f = spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size

        def read(role: str, *shape: int, layer: int = 0, suffix: str = "weight") -> torch.Tensor:
            source = family.tensors[role]
            if isinstance(source, Slice):
                packed = (q + 2 * kv, *shape[1:])
                name = f"{source.name.format(i=layer)}.{suffix}"
                tensor = source.take(checkpoint.read(name, packed), spec)
            else:
                tensor = checkpoint.read(f"{source.format(i=layer)}.{suffix}", shape)
            return tensor.to(device=device, dtype=dtype)

        def join(layer: int, has_bias: bool, num_in: int, /, **rows: int) -> Dense:
            weights = [read(role, n, num_in, layer=layer) for role, n in rows.items()]
            biases = (
                [read(role, n, layer=layer, suffix="bias") for role, n in rows.items()]
                if has_bias
                else []
            )
            return Dense(_join(weights), _join(biases) if biases else None)

        layers = [
            LayerWeights(
                attention_norm=read("attention_norm", d, layer=i),
                qkv=join(i, spec.qkv_bias, d, q=q, k=kv, v=kv),
                q_norm=read("q_norm", spec.head_dim, layer=i) if spec.qk_norm else None,
                k_norm=read("k_norm", spec.head_dim, layer=i) if spec.qk_norm else None,
                output=join(i, spec.output_bias, q, output=d),
                mlp_norm=read("mlp_norm", d, layer=i),
                gate_up=join(i, spec.mlp_bias, d, gate=f, up=f),
                down=join(i, spec.mlp_bias, f, down=d),
            )
            for i in range(spec.num_layers)
        ]
        final_norm_D = read("final_norm", d)
        embedding_VD = read("embedding", spec.vocab_size, d)
        head_VD = embedding_VD if spec.tied_head else read("head", spec.vocab_size, d)
        head_name = f"{family.tensors['head']}.weight"
        left = [n for n in checkpoint.unread() if not (spec.tied_head and n == head_name)]
        if left:
            raise ValueError(
                f"model: {len(left)} tensors of {checkpoint.folder} have no place in "
                f"{checkpoint.config['architectures'][0]}, the first is {left[0]}"
            )
        return cls(
            spec,
            embedding_VD=embedding_VD,
            layers=layers,
            final_norm_D=final_norm_D,
            # Only a GPU multiplies 16-bit operands into a float32 result.
            head_VD=head_VD if device.type == "cuda" else head_VD.float(),
            block_rows=block_rows,
        )

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states after the final norm, [T, D].

        `ids_T` int64 holds sequences of the given `lengths` one after another, padded with any
        valid id to a multiple of `block_rows`; rows of padding come out meaningless.
        """
        spec = self.spec
        x_TD = self._embedding_VD[ids_T]
        cos_TR, sin_TR = self._angles(len(ids_T), lengths)
        scale = spec.head_dim**-0.5
        q_THD = x_TD.new_empty(len(ids_T), spec.num_heads, spec.head_dim)
        k_TGD = x_TD.new_empty(len(ids_T), spec.num_kv_heads, spec.head_dim)
        v_TGD = torch.empty_like(k_TGD)
        for layer, window in zip(self._layers, spec.windows, strict=True):
            for rows in self._blocks(len(ids_T)):
                qkv = layer.qkv(rms_norm(x_TD[rows], layer.attention_norm, spec.norm_eps))
                q, k, v = (
                    part.unflatten(-1, (-1, spec.head_dim))
                    for part in qkv.split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
                )
                if layer.q_norm is not None and layer.k_norm is not None:
                    q = rms_norm(q, layer.q_norm, spec.norm_eps)
                    k = rms_norm(k, layer.k_norm, spec.norm_eps)
                q_THD[rows] = rotate(q, cos_TR[rows], sin_TR[rows])
                k_TGD[rows] = rotate(k, cos_TR[rows], sin_TR[rows])
                v_TGD[rows] = v
            mixed_TQ = attend(q_THD, k_TGD, v_TGD, lengths, scale=scale, window=window).flatten(1)
            for rows in self._blocks(len(ids_T)):
                x = x_TD[rows]
                x += layer.output(mixed_TQ[rows])
                normed = rms_norm(x, layer.mlp_norm, spec.norm_eps)
                x += layer.down(gate(layer.gate_up(normed), spec.activation))
        for rows in self._blocks(len(ids_T)):
            x_TD[rows] = rms_norm(x_TD[rows], self._final_norm_D, spec.norm_eps)
        return x_TD

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of rows of hidden states, float32 [R, V]."""
        return linear.multiply_wide(hidden_RD, self._head_VD)

    def _blocks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.block_rows):
            yield slice(start, start + self.block_rows)

    def _angles(self, num_rows: int, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every packed token's angles, [T, rotary dim / 2] each."""
        rotary = self.spec.rotary
        tables = [rotary.frequencies(n) for n in (lengths if rotary.depends_on_length else [0])]
        count = torch.tensor(lengths)
        starts = torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
        positions_T = torch.zeros(num_rows)
        positions_T[: len(starts)] = torch.arange(len(starts)) - starts
        if rotary.depends_on_length:
            padding = num_rows - len(starts)
            rates = torch.stack([table for table, _ in tables])
            rates_TR = torch.repeat_interleave(rates, count, dim=0)
            rates_TR = torch.cat([rates_TR, rates[:1].expand(padding, -1)])
        else:
            rates_TR = tables[0][0][None]
        angles_TR = (positions_T[:, None] * rates_TR).to(self.device)
        factor = tables[0][1]
        cos_TR, sin_TR = angles_TR.cos() * factor, angles_TR.sin() * factor
        return cos_TR.to(self.dtype), sin_TR.to(self.dtype)


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
