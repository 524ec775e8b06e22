"""Loads a checkpoint of a known family as a decoder, its linears in the formats of a scheme."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..kernels.norms import NormWeights
from .checkpoint import Checkpoint
from .decoder import (
    Decoder,
    DenseFeedForward,
    LayerWeights,
    Part,
    Projection,
    SparseFeedForward,
)
from .experts import GroupedLinear, SparseExperts, make_grouped
from .families import Family, Slice
from .formats import Linear, Scheme, make_head, make_linear
from .latent import LatentProjection
from .layouts import Source, is_cache_scale
from .mxfp4 import BLOCK, dequantize_mxfp4
from .placement import Arrangement, Disk, Room, arrange
from .residency import Layers, Resident, Streamed, count_bytes
from .scratch import Scratch, find_folder
from .shared import Shared, identify, share
from .spec import DecoderSpec, Experts, FeedForward, Norm
from .weights import Plain, Weight, join

# Buffers that older versions of transformers stored beside the weights.
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias)|attention\.rotary_emb\..*)$"
)


# Roles with rows that are turned by positions.
_TURNED = ("q", "k", "q_up", "kv_down")


def load_decoder(
    checkpoint: Checkpoint,
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    room: Room | None,
    scheme: Scheme,
) -> Decoder:
    """Read a checkpoint onto `device`: linears as `scheme` says, everything else in `dtype`.

    `room` says what there is; layers that do not fit stay in host memory or on disk. None keeps
    all of them on the device.

    Raises:
        ValueError: naming the tensor that is missing, misshapen, not finite or left over, or the
            memory or the disk that is short.
    """
    spec = family.spec(checkpoint.config)
    reader = _Reader(checkpoint, family, spec, scheme, device, dtype, on_gpu=device.type != "cpu")
    key = identify(checkpoint, scheme, device=device, dtype=dtype)
    shared = None
    # On a CPU nothing is streamed from host memory.
    if room is not None and room.wanted in (None, "host") and not room.is_host:
        shared = share(key, spec.num_layers)
    # What is no checkpoint of files has no headers, and is not slow to read.
    if room is not None and key is not None:
        on_meta = _Reader(
            checkpoint, family, spec, scheme, torch.device("meta"), dtype, on_gpu=not room.is_host
        )
        fixed_bytes, (sizes, _) = count_bytes(on_meta.tables()), _read_kinds(on_meta, spec)
        whole = shared.whole if shared is not None else ()
        _check_disk(on_meta.arrange(sizes, fixed_bytes, room, shared=whole))
    embedding_VD, positions_PD, head = tables = reader.tables()
    layers, arrangement = _read_layers(reader, spec, count_bytes(tables), room, device, shared)
    final_norm = reader.final_norm()
    checkpoint.finish()
    _check_read(checkpoint, reader, spec, scheme)
    return Decoder(
        spec,
        embedding_VD=embedding_VD,
        positions_PD=positions_PD,
        layers=layers,
        final_norm=final_norm,
        head=head,
        arrangement=arrangement,
    )


def measure(
    checkpoint: Checkpoint, family: Family, *, dtype: torch.dtype, scheme: Scheme, room: Room
) -> Arrangement:
    """Where layers would live, from the headers of files, without a weight being read.

    Raises:
        ValueError: as `load_decoder`, but for weights that are not finite.
    """
    spec = family.spec(checkpoint.config)
    reader = _Reader(
        checkpoint, family, spec, scheme, torch.device("meta"), dtype, on_gpu=not room.is_host
    )
    fixed_bytes = count_bytes(reader.tables())
    layer_bytes = [count_bytes(reader.layer(i)) for i in range(spec.num_layers)]
    reader.final_norm()
    checkpoint.finish()
    _check_read(checkpoint, reader, spec, scheme)
    arrangement = reader.arrange(layer_bytes, fixed_bytes, room)
    _check_disk(arrangement)
    return arrangement


def _check_disk(arrangement: Arrangement) -> None:
    """ValueError if layers shall come from a disk that has no room for them."""
    placement = arrangement.placement
    if placement.is_streamed and placement.source == "disk":
        find_folder(placement.streamed_bytes)


def _check_read(checkpoint: Checkpoint, reader: _Reader, spec: DecoderSpec, scheme: Scheme) -> None:
    """ValueError for tensors that are left over, or where none is stored as config.json says."""
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
        and not _predicts_ahead(name, checkpoint.config)
    ]
    if left:
        raise ValueError(
            f"model: {len(left)} tensors of {checkpoint.folder} have no place in "
            f"{checkpoint.config['architectures'][0]}, the first is {left[0]}"
        )


def _read_layers(
    reader: _Reader,
    spec: DecoderSpec,
    fixed_bytes: int,
    room: Room | None,
    device: torch.device,
    shared: Shared | None,
) -> tuple[Layers[LayerWeights], Arrangement | None]:
    """All layers where they shall live, and how much may run at a time, if `room` says.

    `shared` is the host memory that processes which stream the same layers have in common.
    """
    read: dict[int, LayerWeights] = {}
    arrangement = None
    if room is not None:
        sizes, read = _read_kinds(reader, spec)
        whole = shared.whole if shared is not None else ()
        arrangement = reader.arrange(sizes, fixed_bytes, room, shared=whole)
    layers: Layers[LayerWeights] = Resident(device)
    scratch = None
    if arrangement is not None and arrangement.placement.is_streamed:
        placement = arrangement.placement
        if placement.source == "disk":
            scratch, shared = Scratch(placement.streamed_bytes), None
        layers = Streamed(
            spec.num_layers,
            device=device,
            num_resident=placement.num_resident,
            scratch=scratch,
            shared=shared,
        )
    for i in range(spec.num_layers):
        layers.add(read.pop(i) if i in read else reader.layer(i))
    if arrangement is not None and scratch is not None:
        disk = Disk(str(scratch.folder), scratch.measure())
        arrangement = replace(arrangement, placement=replace(arrangement.placement, disk=disk))
    return layers, arrangement


def _read_kinds(reader: _Reader, spec: DecoderSpec) -> tuple[list[int], dict[int, LayerWeights]]:
    """What each layer takes, and the first of each kind, which says what all of it take."""
    first: dict[FeedForward | Experts, int] = {}
    for i, layer in enumerate(spec.layers):
        first.setdefault(layer.feed_forward, i)
    read = {i: reader.layer(i) for i in first.values()}
    return [count_bytes(read[first[layer.feed_forward]]) for layer in spec.layers], read


def _predicts_ahead(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a layer behind the last, which predicts tokens further ahead."""
    if not config.get("num_nextn_predict_layers"):
        return False
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= config["num_hidden_layers"]


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
        *,
        on_gpu: bool,
    ) -> None:
        self._source = Source(checkpoint, device)
        self._tensors = family.tensors_of(checkpoint.config)
        self._transposed = family.transposed
        self._spec = spec
        self._scheme = scheme
        self._dtype = dtype
        self._on_gpu = on_gpu
        self.found_quantized = False
        """Whether any tensor was stored as the config says."""
        self._last: tuple[str, Weight] | None = None
        """The last packed tensor, which is asked for part by part."""
        for prefix in family.prefixes:
            self._prefix = (family.prefixes[0], prefix)
            if f"{self.name('embedding', 0)}.weight" in self._source:
                break
        else:
            self._prefix = ("", "")

    def name(self, role: str, layer: int, expert: int = 0) -> str:
        """What the checkpoint calls a role, or the tensor that it is a part of."""
        source = self._tensors[role]
        name = (source.name if isinstance(source, Slice) else source).format(i=layer, e=expert)
        usual, found = self._prefix
        return found + name.removeprefix(usual) if name.startswith(usual) else name

    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None, Linear]:
        """The embedding [V, D], the table of positions [P, D] if there is one, and the head."""
        spec, d = self._spec, self._spec.hidden_size
        embedding_VD = self.table("embedding", spec.vocab_size, d)
        positions_PD = None
        if spec.positions is not None:
            positions_PD = self.table("positions", spec.positions, d)
        head_VD = embedding_VD if spec.tied_head else self.table("head", spec.vocab_size, d)
        return embedding_VD, positions_PD, make_head(head_VD, self._scheme, on_gpu=self._on_gpu)

    def final_norm(self) -> NormWeights:
        """The norm in front of the head."""
        return self.norm("final_norm", self._spec.norm, self._spec.hidden_size, 0)

    def arrange(
        self,
        layer_bytes: Sequence[int],
        fixed_bytes: int,
        room: Room,
        *,
        shared: Collection[int] = (),
    ) -> Arrangement:
        """`placement.arrange` for what this reads."""
        return arrange(
            self._spec,
            layer_bytes,
            fixed_bytes,
            room,
            width=self._dtype.itemsize,
            expanded=self._scheme.expanded(self._dtype),
            shared=shared,
        )

    def layer(self, i: int) -> LayerWeights:
        """All weights of a layer."""
        spec = self._spec
        d = spec.hidden_size
        norm = partial(self.norm, spec=spec.norm, size=d, layer=i)
        pre, post = spec.pre_norm, spec.post_norm
        own_mlp_norm = pre and not (spec.parallel and spec.shared_norm)
        return LayerWeights(
            attention_norm=norm("attention_norm") if pre else None,
            qkv=self._projection(i),
            q_norm=self._qk_norm("q_norm", spec.num_heads, i),
            k_norm=self._qk_norm("k_norm", spec.num_kv_heads, i),
            sinks_H=self._sinks(i) if spec.sinks else None,
            output=self._linear(i, spec.output_bias, spec.num_heads * spec.value_dim, output=d),
            attention_post_norm=norm("attention_post_norm") if post else None,
            mlp_norm=norm("mlp_norm") if own_mlp_norm else None,
            feed_forward=self._feed_forward(i),
            mlp_post_norm=norm("mlp_post_norm") if post else None,
        )

    def _projection(self, i: int) -> Projection:
        spec = self._spec
        d, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
        if spec.latent is None:
            return self._linear(i, spec.qkv_bias, d, q=q, k=kv, v=kv)
        latent, heads = spec.latent, spec.num_heads
        rest = latent.kv_rank + latent.rope_dim
        first = {"q": q} if latent.q_rank is None else {"q_down": latent.q_rank}
        biased = ("q_down", "kv_down") if latent.bias else ()
        down = self._linear(i, biased, d, **first, kv_down=rest)
        q_norm = q_up = None
        if latent.q_rank is not None:
            q_norm = self.norm("q_down_norm", latent.norm, latent.q_rank, i)
            q_up = self._linear(i, False, latent.q_rank, q_up=q)
        kv_norm = self.norm("kv_down_norm", latent.norm, latent.kv_rank, i)
        both = heads * (latent.nope_dim + latent.value_dim)
        kv_up = self._linear(i, False, latent.kv_rank, kv_up=both)
        return LatentProjection(latent, heads, down, q_norm, q_up, kv_norm, kv_up)

    def _feed_forward(self, i: int) -> Part:
        shape = self._spec.layers[i].feed_forward
        if isinstance(shape, Experts):
            return SparseFeedForward(self._experts(i, shape))
        return DenseFeedForward(*self._up_down(i, shape), shape.activation, shape.gated)

    def _up_down(self, i: int, shape: FeedForward, prefix: str = "") -> tuple[Linear, Linear]:
        """The linears of a feed-forward, whose roles begin with `prefix`."""
        d, f = self._spec.hidden_size, shape.size
        up = self._linear(i, shape.up_bias, d, **{prefix + role: f for role in _roles(shape)})
        return up, self._linear(i, shape.down_bias, f, **{f"{prefix}down": d})

    def _experts(self, i: int, shape: Experts) -> SparseExperts:
        d, router = self._spec.hidden_size, shape.router
        rows = {"router": router.num_experts}
        router_ED = self._wide(f"{self.name('router', i)}.weight", (router.num_experts, d))
        shared = shared_gate_1D = None
        if shape.shared is not None:
            shared = self._up_down(i, shape.shared, "shared_")
        if shape.shared_gate:
            shared_gate_1D = self._wide(f"{self.name('shared_expert_gate', i)}.weight", (1, d))
        correction_E = None
        if router.correction:
            correction_E = self._plain(self.name("correction", i), (router.num_experts,)).float()
        grouped = self._packed_experts if "expert_gate_up" in self._tensors else self._split_experts
        gate_up, down = grouped(i, shape.expert, router.num_experts)
        return SparseExperts(
            spec=shape,
            router_ED=router_ED,
            router_bias_E=self._vector("router", i, rows, "bias") if router.bias else None,
            correction_E=correction_E,
            gate_up=gate_up,
            down=down,
            shared=shared,
            shared_gate_1D=shared_gate_1D,
        )

    def _split_experts(
        self, i: int, shape: FeedForward, num_experts: int
    ) -> tuple[GroupedLinear, GroupedLinear]:
        """Experts whose linears are stored one by one."""
        d, f = self._spec.hidden_size, shape.size
        roles = [f"expert_{role}" for role in _roles(shape)]
        up = self._group(i, num_experts, roles, (f, d))
        return up, self._group(i, num_experts, ["expert_down"], (d, f))

    def _group(
        self, i: int, num_experts: int, roles: Sequence[str], shape: tuple[int, int]
    ) -> GroupedLinear:
        """One linear of every expert, of roles whose outputs lie side by side."""
        weights, biases = [], []
        for expert in range(num_experts):
            names = [self.name(role, i, expert) for role in roles]
            parts = [self._read(name, shape) for name in names]
            joined = join(parts) if len({part.kind for part in parts}) == 1 else None
            weights.append(joined or Plain(torch.cat([part.dense(self._dtype) for part in parts])))
            # Some quantizers give every linear a bias, be it of zeros.
            given = [
                self._plain(f"{name}.bias", shape[:1])
                for name, part in zip(names, parts, strict=True)
                if not isinstance(part, Plain) and f"{name}.bias" in self._source
            ]
            if given and len(given) < len(names):
                raise ValueError(
                    f"model: of {', '.join(names)} in {self._source.checkpoint.folder} some have "
                    "biases and some have none"
                )
            if given:
                biases.append(torch.cat(given).to(self._dtype))
        if biases and len(biases) < num_experts:
            raise ValueError(
                f"model: of the experts of layer {i} in {self._source.checkpoint.folder} some have "
                "biases and some have none"
            )
        bias_EN = torch.stack(biases) if biases else None
        return make_grouped(weights, bias_EN, self._scheme, self._dtype)

    def _packed_experts(
        self, i: int, shape: FeedForward, num_experts: int
    ) -> tuple[GroupedLinear, GroupedLinear]:
        """All experts in one tensor, [experts, inputs, outputs] or in mxfp4 (gpt-oss).

        Rows of gate and up alternate.
        """
        d, f = self._spec.hidden_size, shape.size
        made = []
        for role, rows, columns in (("expert_gate_up", 2 * f, d), ("expert_down", d, f)):
            name = self.name(role, i)
            if f"{name}_blocks" in self._source:
                blocks = (num_experts, rows, columns // BLOCK)
                weight_ENK = dequantize_mxfp4(
                    self._source.read(f"{name}_blocks", (*blocks, BLOCK // 2)),
                    self._source.read(f"{name}_scales", blocks),
                    self._dtype,
                )
            else:
                weight_ENK = self._plain(name, (num_experts, columns, rows)).transpose(1, 2)
            bias_EN = None
            if shape.up_bias:
                bias_EN = self._plain(f"{name}_bias", (num_experts, rows)).to(self._dtype)
            if role == "expert_gate_up":
                weight_ENK = _apart(weight_ENK)
                bias_EN = None if bias_EN is None else _apart(bias_EN)
            weights = [Plain(weight_NK.contiguous()) for weight_NK in weight_ENK]
            made.append(make_grouped(weights, bias_EN, self._scheme, self._dtype))
        return made[0], made[1]

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
        return replace(norm, weight=self._turn_apart(role[0], norm.weight))

    def _sinks(self, layer: int) -> torch.Tensor:
        return self._plain(self.name("sinks", layer), (self._spec.num_heads,)).float()

    def table(self, role: str, num_rows: int, num_columns: int) -> torch.Tensor:
        """An embedding or the head, dense whatever it is stored as; [rows, columns]."""
        weight = self._read(self.name(role, 0), (num_rows, num_columns), transposed=False)
        return weight.dense(self._dtype)

    def _linear(
        self, layer: int, has_bias: bool | Collection[str], num_in: int, /, **rows: int
    ) -> Linear:
        """One linear of several roles, their outputs side by side; all or some have biases."""
        biased = has_bias if not isinstance(has_bias, bool) else rows if has_bias else ()
        weights = [self._weight(role, layer, num_in, rows) for role in rows]
        biases = [
            self._bias(role, layer, role in biased, rows, weight)
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
        return self._turn_apart(role, bias) if role in _TURNED else bias

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
            if self._last is None or self._last[0] != name:
                self._last = (name, self._read(name, (sum(rows.values()), num_columns)))
            packed = self._last[1]
            weight = packed.map_rows(lambda x: source.take(x, self._spec, rows))
        else:
            weight = self._read(name, (rows[role], num_columns))
        return weight.map_rows(partial(self._turn_apart, role)) if role in _TURNED else weight

    def _turn_apart(self, role: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of heads whose neighbours turn together, so that i turns with i + dim / 2.

        Queries and keys are permuted alike, which leaves their products as they are.
        """
        spec, latent = self._spec, self._spec.latent
        rotary = next((x.rotary for x in spec.layers if x.rotary is not None), None)
        if rotary is None or not rotary.interleaved:
            return tensor
        before, size = 0, spec.head_dim
        if latent is not None:
            before, size = latent.nope_dim, spec.head_dim
            if role == "kv_down":
                before, size = latent.kv_rank, len(tensor)
        heads = tensor.unflatten(0, (-1, size))
        turned = heads[:, before : before + rotary.dim]
        parts = [heads[:, :before], turned[:, 0::2], turned[:, 1::2]]
        return torch.cat([*parts, heads[:, before + rotary.dim :]], 1).flatten(0, 1)

    def _read(self, name: str, shape: tuple[int, int], transposed: bool | None = None) -> Weight:
        weight = self._scheme.stored.read(self._source, name, shape)
        self.found_quantized |= weight is not None
        if weight is not None:
            return weight
        if self._transposed if transposed is None else transposed:
            return Plain(self._plain(f"{name}.weight", shape[::-1]).t().contiguous())
        return Plain(self._plain(f"{name}.weight", shape))

    def _wide(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What is multiplied in float32: as stored, if that is what is computed in anyway."""
        tensor = self._plain(name, shape)
        return tensor if tensor.dtype == self._dtype else tensor.float()

    def _plain(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._source.read(name, shape)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            raise ValueError(
                f"model: tensor {name} in {self._source.checkpoint.folder} is stored as "
                f"{tensor.dtype}, and config.json does not say what its numbers mean"
            )
        return tensor


def _roles(shape: FeedForward) -> tuple[str, ...]:
    return ("gate", "up") if shape.gated else ("up",)


def _apart(rows_EN: torch.Tensor) -> torch.Tensor:
    """Every other row, then the rest."""
    return torch.cat([rows_EN[:, 0::2], rows_EN[:, 1::2]], 1)
