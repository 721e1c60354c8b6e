"""What a model with beacons says of every token of a text: logits window by window, and losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from beacon.beacon_cache import BeaconCache
from beacon.config import BeaconConfig

_IGNORED = -100


def score(model: Any, ids: torch.Tensor, cache: BeaconCache) -> Iterator[torch.Tensor]:
    """Yield the logits [rows, n, vocabulary] of all tokens in order, one window at a time.

    Only one window's logits exist at any moment. A cache that has seen something goes on from there.

    Args:
        model: inside ``beacon.installed``, in evaluation mode.
        ids: [rows, tokens], no padding.
        cache: made with ``expected`` = the number of tokens, if its ratio adapts to the length.

    >>> import beacon
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, eos_token_id=2)).eval()
    >>> config = beacon.BeaconConfig(window=8, stride=8, ratio=(4,))
    >>> with beacon.installed(model, config), torch.no_grad():
    ...     sizes = [part.shape for part in score(model, torch.ones(1, 20).long(), beacon.BeaconCache(model, config))]
    >>> sizes
    [torch.Size([1, 8, 9]), torch.Size([1, 8, 9]), torch.Size([1, 4, 9])]
    """
    for part in ids.split(cache.config.window, dim=1):
        yield model(part, past_key_values=cache).logits


@dataclass(frozen=True)
class Losses:
    """Cross entropy of a batch.

    >>> Losses(torch.tensor(2.0), torch.tensor([1.0, 3.0]), torch.tensor([5, 5])).mean
    tensor(2.)
    """

    mean: torch.Tensor
    """[] over all counted labels"""
    rows: torch.Tensor
    """[rows] mean of each row"""
    counted: torch.Tensor
    """[rows] labels that count"""


def losses(model: Any, ids: torch.Tensor, labels: torch.Tensor, config: BeaconConfig) -> Losses:
    """Return the loss of every window together; gradients flow through all of them.

    Labels are shifted once, so that a window's first token is predicted by the last of the one before. In training,
    those of the first window count only where its beacons can learn from them: interleaved, with full coverage.
    Logits are formed one window at a time.

    Args:
        model: inside ``beacon.installed``; in training mode the window that ends the text gets no beacons.
        ids: [rows, tokens], no padding.
        labels: [rows, tokens], not shifted, -100 = does not count.
        config: the one installed.

    Raises:
        ValueError: shapes that differ, or no label that counts.
    """
    if ids.shape != labels.shape:
        raise ValueError(f"ids and labels must have one shape, got {list(ids.shape)} and {list(labels.shape)}")
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    if model.training and (config.pos, config.attn) != ("interleave", "full-coverage"):
        targets[:, : config.window] = _IGNORED
    counted = (targets != _IGNORED).sum(1)
    if not int(counted.sum()):
        raise ValueError(f"no label of the {ids.shape[1]} tokens counts: give a longer text, or fewer labels of -100")
    states = model.get_decoder()(input_ids=ids).last_hidden_state
    total = states.new_zeros(len(ids), dtype=torch.float32)
    for part, wanted in zip(states.split(config.window, 1), targets.split(config.window, 1), strict=True):
        logits = model.get_output_embeddings()(part).float().transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", ignore_index=_IGNORED)
        total = total + each.sum(1)
    return Losses(total.sum() / counted.sum(), total / counted.clamp(min=1), counted)
