"""Loads a checkpoint of a known family as a decoder, its linears in the formats of a scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import torch

from ..kernels.norms import NormWeights
from .checkpoint import Checkpoint
from .decoder import Decoder, DenseFeedForward, LayerWeights, Part
from .families import Family, Slice
from .formats import Linear, Scheme, make_head, make_linear
from .layouts import Source, is_cache_scale
from .spec import DecoderSpec, FeedForward, Norm
from .weights import Plain, Weight

# Buffers that older versions of transformers stored beside the weights.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias)|attention\.rotary_emb\..*)$"
)


def load_decoder(
    checkpoint: Checkpoint,
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_rows: int,
    scheme: Scheme,
) -> Decoder:
    """Read a checkpoint onto `device`: linears as `scheme` says, everything else in `dtype`.

    Raises:
        ValueError: naming the tensor that is missing, misshapen, not finite or left over.
    """
    spec = family.spec(checkpoint.config)
    reader = _Reader(checkpoint, family, spec, scheme, device, dtype)
    d = spec.hidden_size
    layers = [reader.layer(i) for i in range(spec.num_layers)]
    final_norm = reader.norm("final_norm", spec.norm, d, 0)
    embedding_VD = reader.table("embedding", spec.vocab_size, d)
    positions_PD = None
    if spec.positions is not None:
        positions_PD = reader.table("positions", spec.positions, d)
    head_VD = embedding_VD if spec.tied_head else reader.table("head", spec.vocab_size, d)
    checkpoint.finish()
    if scheme.stored.groups and not reader.found_quantized:
        raise ValueError(
            f"quantization: config.json of {checkpoint.folder} says {scheme.stored.method}, but no "
            "tensor is stored so; take quantization_config out, or use the right files"
        )
    tied_name = f"{reader.name('head', 0)}." if spec.tied_head else None
    left = [
        name
        for name in checkpoint.unread()
        if not is_cache_scale(name)
        and not (tied_name and name.startswith(tied_name))
        and not _BUFFERS.search(name)
    ]
    if left:
        raise ValueError(
            f"model: {len(left)} tensors of {checkpoint.folder} have no place in "
            f"{checkpoint.config['architectures'][0]}, the first is {left[0]}"
        )
    return Decoder(
        spec,
        embedding_VD=embedding_VD,
        positions_PD=positions_PD,
        layers=layers,
        final_norm=final_norm,
        head=make_head(head_VD, scheme),
        block_rows=block_rows,
    )


class _Reader:
    """Tensors by their roles in a family."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        spec: DecoderSpec,
        scheme: Scheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._source = Source(checkpoint, device)
        self._tensors = family.tensors_of(checkpoint.config)
        self._transposed = family.transposed
        self._spec = spec
        self._scheme = scheme
        self._dtype = dtype
        self.found_quantized = False
        """Whether any tensor was stored as the config says."""
        # A packed tensor is asked for part by part.
        self._packed = lru_cache(maxsize=1)(self._read)
        for prefix in family.prefixes:
            self._prefix = (family.prefixes[0], prefix)
            if f"{self.name('embedding', 0)}.weight" in self._source:
                break
        else:
            self._prefix = ("", "")

    def name(self, role: str, layer: int) -> str:
        """What the checkpoint calls a role, or the tensor that it is a part of."""
        source = self._tensors[role]
        name = (source.name if isinstance(source, Slice) else source).format(i=layer)
        usual, found = self._prefix
        return found + name.removeprefix(usual) if name.startswith(usual) else name

    def layer(self, i: int) -> LayerWeights:
        """All weights of a layer."""
        spec = self._spec
        d, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
        norm = partial(self.norm, spec=spec.norm, size=d, layer=i)
        pre, post = spec.pre_norm, spec.post_norm
        own_mlp_norm = pre and not (spec.parallel and spec.shared_norm)
        return LayerWeights(
            attention_norm=norm("attention_norm") if pre else None,
            qkv=self._linear(i, spec.qkv_bias, d, q=q, k=kv, v=kv),
            q_norm=self._qk_norm("q_norm", spec.num_heads, i),
            k_norm=self._qk_norm("k_norm", spec.num_kv_heads, i),
            sinks_H=self._sinks(i) if spec.sinks else None,
            output=self._linear(i, spec.output_bias, q, output=d),
            attention_post_norm=norm("attention_post_norm") if post else None,
            mlp_norm=norm("mlp_norm") if own_mlp_norm else None,
            feed_forward=self._feed_forward(i),
            mlp_post_norm=norm("mlp_post_norm") if post else None,
        )

    def _feed_forward(self, i: int) -> Part:
        shape = self._spec.layers[i].feed_forward
        assert isinstance(shape, FeedForward)
        d, f = self._spec.hidden_size, shape.size
        rows = {"gate": f, "up": f} if shape.gated else {"up": f}
        return DenseFeedForward(
            self._linear(i, shape.up_bias, d, **rows),
            self._linear(i, shape.down_bias, f, down=d),
            shape.activation,
            shape.gated,
        )

    def norm(self, role: str, spec: Norm, size: int, layer: int) -> NormWeights:
        """A norm of `size` columns."""
        weight = self._vector(role, layer, {role: size})
        if spec.offset:
            # In float32: to add in fewer bits would cost those that tell weights apart.
            weight = weight.float() + spec.offset
        bias = self._vector(role, layer, {role: size}, "bias") if spec.bias else None
        return NormWeights(weight, spec.eps, bias, spec.centred)

    def _qk_norm(self, role: str, num_heads: int, layer: int) -> NormWeights | None:
        spec = self._spec
        if spec.qk_norm is None:
            return None
        size = num_heads * spec.head_dim if spec.qk_norm_of_row else spec.head_dim
        norm = self.norm(role, spec.qk_norm, size, layer)
        return NormWeights(self._half_split(norm.weight), norm.eps, norm.bias, norm.centred)

    def _sinks(self, layer: int) -> torch.Tensor:
        return self._plain(self.name("sinks", layer), (self._spec.num_heads,)).float()

    def table(self, role: str, num_rows: int, num_columns: int) -> torch.Tensor:
        """An embedding or the head, dense whatever it is stored as; [rows, columns]."""
        weight = self._read(self.name(role, 0), (num_rows, num_columns), transposed=False)
        return weight.dense(self._dtype)

    def _linear(self, layer: int, has_bias: bool, num_in: int, /, **rows: int) -> Linear:
        """One linear of several roles, their outputs side by side."""
        weights = [self._weight(role, layer, num_in, rows) for role in rows]
        biases = [
            self._bias(role, layer, has_bias, rows, weight)
            for role, weight in zip(rows, weights, strict=True)
        ]
        return make_linear(weights, self._join(biases, weights), self._scheme, self._dtype)

    def _bias(
        self, role: str, layer: int, has_bias: bool, rows: Mapping[str, int], weight: Weight
    ) -> torch.Tensor | None:
        # Some quantizers give every linear a bias, be it of zeros.
        given = not isinstance(weight, Plain) and f"{self.name(role, layer)}.bias" in self._source
        if not (has_bias or given):
            return None
        bias = self._vector(role, layer, rows, "bias")
        return self._half_split(bias) if role in ("q", "k") else bias

    def _join(
        self, biases: Sequence[torch.Tensor | None], weights: Sequence[Weight]
    ) -> torch.Tensor | None:
        if all(bias is None for bias in biases):
            return None
        if len(biases) == 1:
            return biases[0]
        zeros = partial(torch.zeros, dtype=self._dtype, device=self._source.device)
        return torch.cat(
            [
                zeros(weight.shape[0]) if bias is None else bias
                for bias, weight in zip(biases, weights, strict=True)
            ]
        )

    def _vector(
        self, role: str, layer: int, rows: Mapping[str, int], suffix: str = "weight"
    ) -> torch.Tensor:
        """A norm's weight or a bias; `rows` are those of all roles of one linear."""
        source, name = self._tensors[role], self.name(role, layer)
        if isinstance(source, Slice):
            packed = self._plain(f"{name}.{suffix}", (sum(rows.values()),))
            return source.take(packed, self._spec, rows).to(self._dtype)
        return self._plain(f"{name}.{suffix}", (rows[role],)).to(self._dtype)

    def _weight(self, role: str, layer: int, num_columns: int, rows: Mapping[str, int]) -> Weight:
        source, name = self._tensors[role], self.name(role, layer)
        if isinstance(source, Slice):
            packed = self._packed(name, (sum(rows.values()), num_columns))
            weight = packed.map_rows(lambda x: source.take(x, self._spec, rows))
        else:
            weight = self._read(name, (rows[role], num_columns))
        return weight.map_rows(self._half_split) if role in ("q", "k") else weight

    def _half_split(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of heads whose neighbours turn together, so that i turns with i + dim / 2.

        Queries and keys are permuted alike, which leaves their products as they are.
        """
        rotary = next((x.rotary for x in self._spec.layers if x.rotary is not None), None)
        if rotary is None or not rotary.interleaved:
            return tensor
        heads = tensor.unflatten(0, (-1, self._spec.head_dim))
        turned = heads[:, : rotary.dim]
        return torch.cat([turned[:, 0::2], turned[:, 1::2], heads[:, rotary.dim :]], 1).flatten(
            0, 1
        )

    def _read(self, name: str, shape: tuple[int, int], transposed: bool | None = None) -> Weight:
        weight = self._scheme.stored.read(self._source, name, shape)
        self.found_quantized |= weight is not None
        if weight is not None:
            return weight
        if self._transposed if transposed is None else transposed:
            return Plain(self._plain(f"{name}.weight", shape[::-1]).t().contiguous())
        return Plain(self._plain(f"{name}.weight", shape))

    def _plain(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._source.read(name, shape)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            raise ValueError(
                f"model: tensor {name} in {self._source.checkpoint.folder} is stored as "
                f"{tensor.dtype}, and config.json does not say what its numbers mean"
            )
        return tensor
