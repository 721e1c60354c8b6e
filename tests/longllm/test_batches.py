"""Batches and their loss: padding, packing and spread positions change nothing that a row sees."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaForCausalLM

from flashcore import hf
from longllm.batches import Collator, batch_loss, headless
from longllm.positions import Spread
from longllm.samples import Samples
from training import LoraSettings, add_lora

LENGTHS = (9, 23, 14, 17)
WORDS = 300
ATTENTIONS = ["sdpa", "flashcore"]


@pytest.fixture(scope="module")
def rows() -> Samples:
    """Rows of random tokens; two thirds are learned."""
    draws = np.random.default_rng(0)
    ids = draws.integers(3, WORDS, sum(LENGTHS)).astype(np.int32)
    return Samples(ids, draws.random(len(ids)) < 0.67, np.cumsum([0, *LENGTHS]), {})


@pytest.fixture
def model(tiny_chat: ModuleType, request: pytest.FixtureRequest) -> LlamaForCausalLM:
    hf.register()
    torch.manual_seed(0)
    config = tiny_chat.config(WORDS, attn_implementation=getattr(request, "param", "sdpa"))
    return LlamaForCausalLM(config)


def alone(model: Any, samples: Samples, row: int, positions: list[int] | None = None) -> torch.Tensor:
    """Return the summed loss of a row by itself, through logits and with explicit causal attention."""
    ids, labels = (torch.tensor([part]) for part in samples[row])
    places = torch.tensor([positions or list(range(ids.shape[1]))])
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1]).tril().bool()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    blocked = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = model(input_ids=ids, position_ids=places, attention_mask=blocked, use_cache=False).logits
    model.set_attn_implementation(before)
    return torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)


def slope(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return the gradient with respect to everything that learns, as one vector."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, wanted)])


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far a vector is from another, as a share of its length."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("model", ATTENTIONS, indirect=True)
def test_a_padded_batch_is_the_sum_of_its_rows(model: LlamaForCausalLM, rows: Samples) -> None:
    wanted = sum(alone(model, rows, row) for row in range(4))
    with headless(model, 7) as loss:
        batch = Collator(rows, pad_id=2)([2, 0, 3, 1], ["a"] * 4)
        found = loss(model, batch)
    assert batch["input_ids"].shape == (4, 23)
    assert batch["weight"] == sum(sum(label != -100 for label in rows[row][1][1:]) for row in range(4))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert off(slope(model, found), slope(model, wanted)) < 1e-5


@pytest.mark.parametrize("model", ATTENTIONS, indirect=True)
def test_packed_rows_do_not_see_each_other(model: LlamaForCausalLM, rows: Samples) -> None:
    collator = Collator.of(rows, room=64)
    assert len(collator.packs) == 1
    assert collator.lengths == [63]
    batch = collator([0], ["a"])
    assert "attention_mask" not in batch
    wanted = sum(alone(model, rows, row) for row in range(4))
    with headless(model) as loss:
        found = loss(model, batch)
        crossing = loss(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert off(slope(model, found), slope(model, wanted)) < 1e-5
    assert abs(float(crossing) - float(wanted)) > 0.1, "with a mask of ones the rows would see each other"


@pytest.mark.parametrize("model", ATTENTIONS, indirect=True)
def test_spread_positions_are_not_taken_for_packed_rows(model: LlamaForCausalLM, rows: Samples) -> None:
    collator = Collator(rows, Spread(length=400, pieces=4))
    batch = collator([1, 2], ["x", "y"])
    places = batch["position_ids"].tolist()
    assert any(after - before > 1 for before, after in zip(places[0], places[0][1:], strict=False))
    wanted = alone(model, rows, 1, places[0]) + alone(model, rows, 2, places[1][:14])
    first = alone(model, rows, 1, places[0])
    single = collator([1], ["x"])
    assert single["position_ids"].tolist()[0] == places[0], "a row draws from its own seed alone"
    with headless(model) as loss:
        assert float(loss(model, batch)) == pytest.approx(float(wanted), rel=1e-5)
        assert float(loss(model, single)) == pytest.approx(float(first), rel=1e-5)
    assert abs(float(alone(model, rows, 1)) - float(first)) > 1e-2


def test_a_batch_for_context_parallelism_has_no_mask_and_a_length_that_divides(
    model: LlamaForCausalLM, rows: Samples
) -> None:
    batch = Collator(rows, pad_id=2, multiple=8)([0, 1], ["a", "b"])
    assert batch["input_ids"].shape == (2, 24)
    assert "attention_mask" not in batch
    with pytest.raises(ValueError, match="packed rows cannot be split among processes"):
        Collator.of(rows, room=64, multiple=8)


def test_packs_are_batches_by_themselves(rows: Samples) -> None:
    with pytest.raises(ValueError, match="packed rows are batches by themselves: set batch_size to 1"):
        Collator.of(rows, room=32)([0, 1], ["a", "b"])


def test_the_model_is_as_before_afterwards(model: LlamaForCausalLM, rows: Samples) -> None:
    ids = torch.arange(9)[None]
    before = model(ids).logits
    with headless(model):
        assert model(ids).logits.shape == (1, 9, 32)
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model.lm_head)
    model.lm_head.forward = own = lambda hidden: hidden * 0  # as accelerate's hooks do
    with headless(model):
        assert float(model(ids).logits.norm()) > 0
    assert model.lm_head.forward is own


@pytest.mark.parametrize(
    "settings", [{}, {"whole": ("embed_tokens",)}, {"whole": ("lm_head",)}, {"tokens": (3, 9)}], ids=str
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_follows_whatever_learns(
    tiny_chat: ModuleType, rows: Samples, settings: dict[str, Any], tied: bool
) -> None:
    base = LlamaForCausalLM(tiny_chat.config(WORDS, tie_word_embeddings=tied))
    model = add_lora(base, LoraSettings(rank=4, **settings)).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    wanted = alone(model.get_base_model(), rows, 1)
    with headless(model, 5) as loss:
        found = loss(model, Collator(rows)([1], ["a"]))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert off(slope(model, found), slope(model, wanted)) < 3e-5


def test_a_head_with_an_adapter_of_its_own_is_refused(model: LlamaForCausalLM) -> None:
    tuned = add_lora(model, LoraSettings(rank=4, targets=("q_proj", "lm_head")))
    with pytest.raises(ValueError, match="head must be a linear layer without an adapter"), headless(tuned):
        pass


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # of transformers, to itself
def test_a_model_that_caps_its_logits_is_matched(rows: Samples) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": WORDS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "attn_logit_softcapping": None}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5, initializer_range=0.5))
    wanted = alone(model, rows, 2)
    with headless(model) as loss:
        assert float(loss(model, Collator(rows)([2], ["a"]))) == pytest.approx(float(wanted), rel=1e-5)
    assert model.config.final_logit_softcapping == 0.5
    free = GemmaForCausalLM(GemmaConfig(**sizes, **{**heads, "attn_logit_softcapping": None}))
    with headless(free) as loss:
        assert loss.softcap is None


def test_the_mean_over_batches_is_per_target(model: LlamaForCausalLM, rows: Samples) -> None:
    collator = Collator(rows)
    with headless(model) as loss:
        apart = batch_loss(loss, model, (collator([row], ["a"]) for row in range(4)))
        together = batch_loss(loss, model, [collator([0, 1, 2, 3], ["a"] * 4)])
        nothing = batch_loss(loss, model, [])
    assert apart == pytest.approx(together, rel=1e-5)
    assert nothing != nothing
