"""A chat model of 60,000 random weights with a tokeniser trained on the spot, saved as a Hugging Face folder."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The whale is white and the sea is wide.",
    "What is the pass key? The pass key is 12345. Remember it.",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "Based on the document above, answer briefly: who is the captain?",
    "Größe, señor, 海と空 and a naïve café.",
]


def tokenizer(texts: Sequence[str] = SENTENCES, size: int = 420) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokeniser with a chat template; every byte has a token, so nothing is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=TEMPLATE)


def config(vocabulary: int, **changes: object) -> LlamaConfig:
    """Return the configuration of the tiny model; weights drawn widely, so that it babbles instead of repeating."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    tokens = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    return LlamaConfig(**{**sizes, **heads, **tokens, "initializer_range": 0.6, **changes})


def build(folder: Path, **changes: object) -> Path:
    """Save model and tokeniser into ``folder``, always with the same weights."""
    torch.manual_seed(0)
    words = tokenizer()
    LlamaForCausalLM(config(len(words), **changes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, context: object = None, **settings: object) -> Path:
    """Save a LoRA adapter of random weights for a base, in PEFT layout, with its context if there is one."""
    import peft

    lora = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings, which are among the cases
        model = LlamaForCausalLM.from_pretrained(base)
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    torch.manual_seed(1)
    for weight in tuned.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    if context is not None:
        context.save(folder)
    return folder
