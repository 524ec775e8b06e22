"""Loads a checkpoint of a known family as a decoder, its linears in the formats of a scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from .checkpoint import Checkpoint
from .decoder import Decoder, LayerWeights
from .families import Family, Slice
from .formats import Linear, Scheme, make_head, make_linear
from .layouts import Source, is_cache_scale
from .spec import DecoderSpec
from .weights import Plain, Weight


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
    d, q, kv, f = spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size
    vector, linear = reader.vector, reader.linear
    layers = [
        LayerWeights(
            attention_norm=vector("attention_norm", d, i),
            qkv=linear(i, spec.qkv_bias, d, q=q, k=kv, v=kv),
            q_norm=vector("q_norm", spec.head_dim, i) if spec.qk_norm else None,
            k_norm=vector("k_norm", spec.head_dim, i) if spec.qk_norm else None,
            output=linear(i, spec.output_bias, q, output=d),
            mlp_norm=vector("mlp_norm", d, i),
            gate_up=linear(i, spec.mlp_bias, d, gate=f, up=f),
            down=linear(i, spec.mlp_bias, f, down=d),
        )
        for i in range(spec.num_layers)
    ]
    final_norm_D = vector("final_norm", d, 0)
    embedding_VD = reader.table("embedding", spec.vocab_size, d)
    head_VD = embedding_VD if spec.tied_head else reader.table("head", spec.vocab_size, d)
    checkpoint.finish()
    if scheme.stored.groups and not reader.found_quantized:
        raise ValueError(
            f"quantization: config.json of {checkpoint.folder} says {scheme.stored.method}, but no "
            "tensor is stored so; take quantization_config out, or use the right files"
        )
    tied_name = f"{family.tensors['head']}." if spec.tied_head else None
    left = [
        name
        for name in checkpoint.unread()
        if not is_cache_scale(name) and not (tied_name and name.startswith(tied_name))
    ]
    if left:
        raise ValueError(
            f"model: {len(left)} tensors of {checkpoint.folder} have no place in "
            f"{checkpoint.config['architectures'][0]}, the first is {left[0]}"
        )
    return Decoder(
        spec,
        embedding_VD=embedding_VD,
        layers=layers,
        final_norm_D=final_norm_D,
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
        self._family = family
        self._spec = spec
        self._scheme = scheme
        self._dtype = dtype
        self.found_quantized = False
        """Whether any tensor was stored as the config says."""
        # A packed tensor is asked for part by part.
        self._packed = lru_cache(maxsize=1)(self._read_packed)

    def vector(self, role: str, size: int, layer: int, suffix: str = "weight") -> torch.Tensor:
        """A norm's weight or a bias, [size]."""
        source = self._family.tensors[role]
        if isinstance(source, Slice):
            packed = self._plain(f"{source.name.format(i=layer)}.{suffix}", (self._packed_rows,))
            return source.take(packed, self._spec).to(self._dtype)
        return self._plain(f"{source.format(i=layer)}.{suffix}", (size,)).to(self._dtype)

    def table(self, role: str, num_rows: int, num_columns: int) -> torch.Tensor:
        """The embedding or the head, dense whatever it is stored as; [rows, columns]."""
        return self._weight(role, 0, num_rows, num_columns).dense(self._dtype)

    def linear(self, layer: int, has_bias: bool, num_in: int, /, **rows: int) -> Linear:
        """One linear of several roles, their outputs side by side."""
        weights = [self._weight(role, layer, n, num_in) for role, n in rows.items()]
        biases = [
            self._bias(role, layer, n, has_bias, weight)
            for (role, n), weight in zip(rows.items(), weights, strict=True)
        ]
        return make_linear(weights, self._join(biases, weights), self._scheme, self._dtype)

    def _bias(
        self, role: str, layer: int, size: int, has_bias: bool, weight: Weight
    ) -> torch.Tensor | None:
        source = self._family.tensors[role]
        name = source.name if isinstance(source, Slice) else source
        # Some quantizers give every linear a bias, be it of zeros.
        given = not isinstance(weight, Plain) and f"{name.format(i=layer)}.bias" in self._source
        return self.vector(role, size, layer, "bias") if has_bias or given else None

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

    def _weight(self, role: str, layer: int, num_rows: int, num_columns: int) -> Weight:
        source = self._family.tensors[role]
        if isinstance(source, Slice):
            packed = self._packed(source.name.format(i=layer), num_columns)
            return packed.map_rows(self._taking(source))
        return self._read(source.format(i=layer), (num_rows, num_columns))

    def _taking(self, source: Slice) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: source.take(tensor, self._spec)

    def _read_packed(self, name: str, num_columns: int) -> Weight:
        return self._read(name, (self._packed_rows, num_columns))

    @property
    def _packed_rows(self) -> int:
        return self._spec.q_size + 2 * self._spec.kv_size

    def _read(self, name: str, shape: tuple[int, int]) -> Weight:
        weight = self._scheme.stored.read(self._source, name, shape)
        self.found_quantized |= weight is not None
        return Plain(self._plain(f"{name}.weight", shape)) if weight is None else weight

    def _plain(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._source.read(name, shape)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            raise ValueError(
                f"model: tensor {name} in {self._source.checkpoint.folder} is stored as "
                f"{tensor.dtype}, and config.json does not say what its numbers mean"
            )
        return tensor
