"""The parameters that Activation Beacon adds to a model: one embedding row, and projections for beacons alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from beacon.backbones import backbone, parts
from beacon.config import BeaconConfig


class LowRank(nn.Module):
    """What is added to a base projection: ``x Aᵀ Bᵀ``, zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int, like: torch.Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the addition for x [..., inputs]."""
        return nn.functional.linear(nn.functional.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class BeaconWeights(nn.Module):
    """The beacons' embedding [1, hidden], and per layer their q, k, v, o projections as far as the config names them.

    Full projections have the shape and bias of the base model's; with ``rank`` a beacon's projection is the base's plus
    a product of two thin matrices, a few megabytes for an 8B model. The parameters belong to no model: give them to
    ``beacon.installed``.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, eos_token_id=2))
    >>> weights = BeaconWeights.initialised(model, BeaconConfig(param=("k",)))
    >>> sorted(weights.released())
    ['model.beacon_embed_tokens.weight', 'model.layers.0.self_attn.beacon_k_proj.weight']
    """

    def __init__(self, model: Any, config: BeaconConfig, rank: int = 0) -> None:
        """Make room for a model's beacons; values are meant to be loaded (see ``initialised``).

        Raises:
            ValueError: an unknown architecture, a negative rank, or full projections beside a quantised base.
        """
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank must be 0 (full projections) or positive, got {rank}")
        self.config, self.rank = config, rank
        names, decoder = backbone(model), model.get_decoder()
        table = getattr(decoder, names.embedding).weight
        self.embed_tokens = nn.Parameter(torch.zeros(1, table.shape[1], dtype=table.dtype, device=table.device))
        self.layers = nn.ModuleList()
        self.own: list[dict[str, nn.Module]] = []
        for part in parts(decoder, names):
            own = {name: self._projection(getattr(part.attention, f"{name}_proj"), table) for name in config.param}
            self.own.append(own)
            self.layers.append(nn.ModuleDict(own))

    @classmethod
    @torch.no_grad()
    def initialised(cls, model: Any, config: BeaconConfig, rank: int = 0) -> BeaconWeights:
        """Return untrained beacons: extra EOS (or BOS) tokens with the base model's projections (paper, section 3.3).

        Raises:
            ValueError: as the constructor, or the model names no such token.
        """
        weights = cls(model, config, rank)
        names, decoder = backbone(model), model.get_decoder()
        token = getattr(model.config, f"{config.embed_init}_token_id", None)
        token = token[0] if isinstance(token, list) else token
        if token is None:
            raise ValueError(
                f"the model names no {config.embed_init} token to start beacons from: set beacon_embed_init"
            )
        weights.embed_tokens.copy_(getattr(decoder, names.embedding).weight[token])
        for own, part in zip(weights.own, parts(decoder, names), strict=True):
            for name, made in own.items():
                if isinstance(made, nn.Linear):
                    base = getattr(part.attention, f"{name}_proj")
                    made.weight.copy_(base.weight)
                    if base.bias is not None:
                        made.bias.copy_(base.bias)
        return weights

    def project(self, layer: int, name: str, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return a beacon projection of ``x`` [batch, k, inputs]; ``base`` is the raw tokens' module."""
        own = self.own[layer]
        if name not in own:
            out: torch.Tensor = base(x)
            return out
        made = own[name]
        if isinstance(made, nn.Linear) and made.weight.dtype != x.dtype:
            # Beacons that learn may be in fp32 beside a model in bf16.
            bias = None if made.bias is None else made.bias.to(x.dtype)
            return nn.functional.linear(x, made.weight.to(x.dtype), bias)
        own_part: torch.Tensor = made(x)
        return base(x) + own_part if self.rank else own_part

    def check(self, model: Any) -> None:
        """Compare the parameters with what a model needs.

        Raises:
            ValueError: beacons made for a model of another shape or dtype.
        """
        names, decoder = backbone(model), model.get_decoder()
        table = getattr(decoder, names.embedding).weight
        layers, dtype = parts(decoder, names), table.dtype
        wanted: dict[str, tuple[int, ...]] = {"model.beacon_embed_tokens.weight": (1, table.shape[1])}
        for (index, part), name in itertools.product(enumerate(layers), self.config.param):
            base, place = getattr(part.attention, f"{name}_proj"), f"model.layers.{index}.self_attn.beacon_{name}_proj"
            if self.rank:
                wanted |= {f"{place}.A": (self.rank, base.in_features), f"{place}.B": (base.out_features, self.rank)}
                continue
            wanted[f"{place}.weight"] = (base.out_features, base.in_features)
            if base.bias is not None:
                wanted[f"{place}.bias"] = (base.out_features,)
        own = {name: tuple(tensor.shape) for name, tensor in self.released().items()}
        other = sorted(own.keys() ^ wanted.keys()) or sorted(x for x in own if own[x] != wanted[x])
        learns = self.embed_tokens.dtype == torch.float32 and any(each.requires_grad for each in self.parameters())
        if other or not (learns or self.embed_tokens.dtype == dtype):
            what = f"{other[0]} does not fit" if other else f"they are {self.embed_tokens.dtype}, it is {dtype}"
            raise ValueError(f"the beacon weights were made for another {model.config.model_type} model: {what}")

    def released_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters under the names of released checkpoints (low-rank ones as ``….A`` and ``….B``)."""
        named = {"model.beacon_embed_tokens.weight": self.embed_tokens}
        for index, own in enumerate(self.own):
            for name, made in own.items():
                for suffix, parameter in made.named_parameters():
                    named[f"model.layers.{index}.self_attn.beacon_{name}_proj.{suffix}"] = parameter
        return named

    def released(self) -> dict[str, torch.Tensor]:
        """Return the tensors under the names of released checkpoints."""
        return {name: parameter.detach() for name, parameter in self.released_parameters().items()}

    @torch.no_grad()
    def load_released(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of a released checkpoint's beacon tensors.

        Raises:
            ValueError: tensors that are missing, left over, or of another shape.
        """
        own = self.released()
        missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        wrong = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
        for what, found in (("lacks", missing), ("has unexpected", left), ("has another shape of", sorted(wrong))):
            if found:
                raise ValueError(f"the checkpoint {what} {len(found)} beacon tensors, such as {found[0]}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def fingerprint(self) -> str:
        """Return a short name of the values: equal for equal beacons."""
        from beacon.saved import weights_name

        return weights_name(self, f"beacons {self.config.param}")

    @torch.no_grad()
    def widened(self, model: Any) -> BeaconWeights:
        """Return the same beacons with full projections: base plus A·B, as released checkpoints hold them."""
        wide = BeaconWeights.initialised(model, self.config)
        wide.embed_tokens.copy_(self.embed_tokens)
        for own, other in zip(self.own, wide.own, strict=True):
            for name, made in own.items():
                if isinstance(made, LowRank):
                    other[name].weight += made.B @ made.A  # type: ignore[operator]
                else:
                    other[name].load_state_dict(made.state_dict())
        return wide

    def _projection(self, base: Any, table: torch.Tensor) -> nn.Module:
        """Return an empty projection for beacons beside a base one."""
        inputs, outputs = base.in_features, base.out_features
        if self.rank:
            return LowRank(inputs, outputs, self.rank, table)
        if base.weight.numel() != inputs * outputs:
            raise ValueError(
                f"the base projections are quantised ({type(base).__name__}): "
                "give beacons low-rank projections (rank), or load the model unquantised"
            )
        made = nn.Linear(inputs, outputs, bias=base.bias is not None, device=table.device, dtype=table.dtype)
        nn.init.zeros_(made.weight)
        return made
