"""How much arithmetic it takes to read a text: with full attention, and window by window with beacons.

Counted are multiply-adds of linear layers and of the two products of attention (scores, and weights times values), in
every layer and for every token alike; the output layer runs for one token. Norms, RoPE and softmax are not counted, nor
is what an engine saves beyond the method, such as the last layer of tokens whose output nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from beacon import BeaconConfig, RowPlan


@dataclass(frozen=True)
class Shape:
    """What one token costs."""

    linear: int
    """multiply-adds of one token in the linear layers of the decoder"""
    pair: int
    """multiply-adds of one query and one key that it sees: all heads of all layers"""
    head: int
    """multiply-adds of the output layer for one token"""

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Measure a decoder of transformers; beacons with full projections cost what raw tokens do."""
        config = model.config.get_text_config(decoder=True)
        layers = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
        head = model.get_output_embeddings()
        return cls(
            linear=sum(layer.in_features * layer.out_features for layer in layers),
            pair=2 * head_dim(config) * config.num_attention_heads * config.num_hidden_layers,
            head=head.in_features * head.out_features,
        )

    def cost(self, tokens: int, pairs: int) -> int:
        """Return the multiply-adds of ``tokens`` that see ``pairs`` keys in all."""
        return self.linear * tokens + self.pair * pairs + self.head


def head_dim(config: Any) -> int:
    """Return the channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def pairs_seen(queries: int, before: int = 0) -> int:
    """Return how many keys ``queries`` new tokens see in all: those ``before`` them, earlier ones, and themselves.

    >>> pairs_seen(3), pairs_seen(3, before=10)
    (6, 36)
    """
    return queries * before + queries * (queries + 1) // 2


def window_work(config: BeaconConfig, tokens: int) -> tuple[int, int]:
    """Return how many tokens run, beacons included, and how many keys they see, when ``tokens`` are read.

    Raises:
        ValueError: a scheme in which beacons do not see all that lies before them.

    >>> window_work(BeaconConfig(window=4, stride=4, ratio=(2,)), 8)  # 6 slots that see 21 keys, 6 after 2 held
    (12, 54)
    """
    if config.attn != "full-coverage":
        raise ValueError(f"only full-coverage is counted, got beacon_attn {config.attn}")
    row, slots, pairs = RowPlan(config), 0, 0
    while row.seen < tokens:
        step = row.plan(tokens - row.seen)
        slots += step.slots
        pairs += pairs_seen(step.slots, step.start)
        row.commit(step)
    return slots, pairs


def limit(shape: Shape, config: BeaconConfig, tokens: int) -> float:
    """Return how many times as fast reading can be with beacons if time is in proportion to multiply-adds."""
    return shape.cost(tokens, pairs_seen(tokens)) / shape.cost(*window_work(config, tokens))
