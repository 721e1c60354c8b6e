"""What one decoder layer keeps for its backward pass, byte for byte, and what that pass needs on top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longllm.planning.sizes import ATTENTION, MLP, Sizes

if TYPE_CHECKING:
    from longllm.planning.memory import Setting

FP32 = 4


def layer_saved(sizes: Sizes, setting: Setting, layer: int) -> int:
    """Return the bytes that autograd saves in a layer that is not recomputed.

    The rotary cosines and sines, which all layers share, are not in it.
    """
    flows = _flows(setting) or layer > 0
    attention = _attention_saved(sizes, setting, flows)
    flows = flows or bool(set(setting.lora.targets) & set(ATTENTION))
    return setting.tokens * (attention + _mlp_saved(sizes, setting, flows))


def saved_bytes(sizes: Sizes, setting: Setting) -> int:
    """Return the bytes that stay from a forward pass for its backward pass, up to the last norm."""
    layers = sum(kept_bytes(sizes, setting, layer) for layer in range(sizes.layers))
    outer = position_bytes(sizes, setting.number) + _norm_saved(setting, sizes.hidden, True)
    return layers + setting.tokens * outer


def kept_bytes(sizes: Sizes, setting: Setting, layer: int) -> int:
    """Return the bytes that stay of a layer from its forward to its backward pass."""
    if not setting.recomputed(layer):
        return layer_saved(sizes, setting, layer)
    return 0 if setting.base.recompute == "offload" else setting.tokens * setting.number * sizes.hidden


def position_bytes(sizes: Sizes, number: int) -> int:
    """Return the bytes of rotary cosines and sines of a token."""
    return 2 * sizes.head_dim * number


def _flows(setting: Setting) -> bool:
    """Say whether gradients flow into the first layer; recomputation lets the inputs ask for them."""
    lora = setting.lora
    return not lora.rank or setting.base.recompute != "off" or bool(lora.tokens or "embed_tokens" in lora.whole)


def _inputs_saved(setting: Setting, width: int, names: tuple[str, ...], flows: bool) -> int:
    """Return the bytes of a token that linear layers with a common input of ``width`` numbers save of it."""
    lora = setting.lora
    if not lora.rank:
        return width * setting.number
    adapted = len(set(lora.targets) & set(names))
    # Dropout gives each adapter an input of its own; its mask is one of bytes on CUDA, and one of numbers on a CPU.
    mask = 1 if setting.device == "cuda" else FP32
    masks = adapted * width * mask if lora.dropout and flows else 0
    # Adapters compute in fp32: where the model does not, each makes its own copy of the input.
    copies = adapted if setting.number < FP32 or lora.dropout else min(adapted, 1)
    learn = setting.number * width if set(lora.whole) & set(names) else 0
    return FP32 * (copies * width + adapted * lora.rank) + masks + learn


def _norm_saved(setting: Setting, width: int, flows: bool, groups: int = 1) -> int:
    """Return the bytes of a token that an RMSNorm saves: its input in fp32, a root per group, what it scales."""
    if not flows:
        return 0
    return FP32 * width + FP32 * groups + (0 if setting.lora.rank else setting.number * width)


def _attention_saved(sizes: Sizes, setting: Setting, flows: bool) -> int:
    """Return the bytes of a token that the first half of a layer saves."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    number, saved = setting.number, _norm_saved(setting, sizes.hidden, flows)
    saved += _inputs_saved(setting, sizes.hidden, ATTENTION[:3], flows)
    attends = flows or bool(set(setting.lora.targets) & set(ATTENTION[:3]))
    shared = 0
    if attends:
        if sizes.kind == "qwen3":
            saved += _norm_saved(setting, queries, True, sizes.heads) + _norm_saved(setting, keys, True, sizes.kv_heads)
        if setting.base.attention == "eager":
            # Keys and values are repeated for each query head, and all probabilities are kept.
            saved += 3 * number * queries + sizes.heads * setting.length * (FP32 + (number if number < FP32 else 0))
        else:
            # Queries, keys, values, output, log-sum-exp.
            saved += number * (2 * queries + 2 * keys) + FP32 * sizes.heads
            shared = number * queries
    output = _inputs_saved(setting, queries, ("o_proj",), attends)
    # In fp32 the projection's input is the saved output of the attention itself.
    if shared and output and number == FP32 and not setting.lora.dropout:
        output -= shared
    return saved + output


def _mlp_saved(sizes: Sizes, setting: Setting, flows: bool) -> int:
    """Return the bytes of a token that the second half of a layer saves."""
    saved = _norm_saved(setting, sizes.hidden, flows) + _inputs_saved(setting, sizes.hidden, MLP[:2], flows)
    flows = flows or bool(set(setting.lora.targets) & set(MLP[:2]))
    if flows:
        saved += 3 * setting.number * sizes.intermediate
    return saved + _inputs_saved(setting, sizes.intermediate, MLP[2:], flows)


def backward_bytes(sizes: Sizes, setting: Setting) -> int:
    """Return the bytes that the backward pass of a layer needs beside what the layer saves.

    The most is alive where the product of gate and value is differentiated: the gradient that comes in and the two
    that go out. A matrix held in NF4 is unpacked for its turn.
    """
    number, inner = setting.number, sizes.intermediate
    adapted = "down_proj" in setting.lora.targets or not setting.lora.rank
    mlp = (2 if adapted else 3) * number * inner
    if adapted and setting.lora.rank and number < FP32:
        mlp = max(mlp, (2 * number + FP32) * inner - FP32 * inner)
    if setting.base.attention == "eager":
        mlp = max(mlp, sizes.heads * setting.length * 2 * FP32 - 3 * number * inner)
    largest = max(inputs * outputs for inputs, outputs in sizes.linear.values())
    return setting.tokens * mlp + (largest * number if setting.base.nf4 else 0)
