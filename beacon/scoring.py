"""What a model with beacons says of every token of a text: logits window by window, and losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from beacon.beacon_cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.distillation import distilled_cross_entropy
from beacon.recipe import Objective
from longllm.linear_cross_entropy import CHUNK, IGNORED, linear_cross_entropy


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


def losses(
    model: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    config: BeaconConfig,
    objective: Objective = Objective(),  # noqa: B008
) -> Losses:
    """Return the loss of every window together; gradients flow through all of them.

    Labels are shifted once, so that a window's first token is predicted by the last of the one before. The logits never
    exist as a whole.

    Args:
        model: inside ``beacon.installed``.
        ids: [rows, tokens], no padding.
        labels: [rows, tokens], not shifted, -100 = does not count.
        config: the one installed.
        objective: which windows count; by default as the reference has it, depending on ``model.training``.

    Raises:
        ValueError: shapes that differ, or no label that counts.
    """
    if ids.shape != labels.shape:
        raise ValueError(f"ids and labels must have one shape, got {list(ids.shape)} and {list(labels.shape)}")
    targets = shifted(labels, config, objective, model.training)
    counted = (targets != IGNORED).sum(1)
    if not int(counted.sum()):
        raise ValueError(f"no label of the {ids.shape[1]} tokens counts: give a longer text, or fewer labels of -100")
    each = row_losses(model, ids, targets, BeaconCache(model, config), objective)
    return Losses(each.sum() / counted.sum(), each / counted.clamp(min=1), counted)


def shifted(labels: torch.Tensor, config: BeaconConfig, objective: Objective, training: bool) -> torch.Tensor:
    """Return the targets [rows, tokens] of labels: that of a token is the next one; -100 = does not count.

    >>> labels = torch.arange(6)[None]
    >>> shifted(labels, BeaconConfig(window=4, stride=4), Objective(first_window="skip"), training=True).tolist()
    [[-100, -100, -100, -100, 5, -100]]
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if objective.skips_first(config, training):
        targets[:, : config.window] = IGNORED
    return targets


def row_losses(
    model: Any,
    ids: torch.Tensor,
    targets: torch.Tensor,
    cache: BeaconCache,
    objective: Objective,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the loss [rows] (fp32) of each row, summed over its targets.

    Args:
        model: inside ``beacon.installed``.
        ids: [rows, tokens], no padding.
        targets: [rows, tokens], already shifted, -100 = does not count.
        cache: a new one; its ratios are used.
        objective: what of the last window has beacons, and how much is learned from the model without beacons.
        chunk: rows of logits that exist at once.

    Raises:
        ValueError: distillation through a head with a bias.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ends = objective.text_ends(model.training)
    states = decoder(input_ids=ids, past_key_values=cache, text_ends=ends).last_hidden_state
    if not objective.distil:
        return torch.stack(
            [
                linear_cross_entropy(own, head.weight, wanted, head.bias, chunk=chunk)
                for own, wanted in zip(states, targets, strict=True)
            ]
        )
    if head.bias is not None:
        raise ValueError("distillation needs a head without bias, which no supported architecture has")
    with torch.no_grad():
        taught = decoder.forward.plain(input_ids=ids, use_cache=False).last_hidden_state
    options: dict[str, Any] = {"share": objective.distil, "temperature": objective.temperature, "chunk": chunk}
    return torch.stack(
        [
            distilled_cross_entropy(own, other, head.weight, wanted, **options)
            for own, other, wanted in zip(states, taught, targets, strict=True)
        ]
    )
