"""A tiny random language model in its true format. It can write nothing but the sentences below, in some order."""

import json
from pathlib import Path

import tiny_llava

from fast_goal.environment import prepare

CAPTION = "A red dog sits on a blue mat."
NEGATIVES = [
    ("swap_adjectives", "A blue dog sits on a red mat."),
    ("swap_nouns", "A red mat sits on a blue dog."),
    ("replace_adjectives", "A green dog sits on a blue mat."),
    ("replace_nouns", "A red cat sits on a blue mat."),
    ("replace_nouns", "A red dog sits on a blue chair."),
    ("reshuffle", "A blue mat sits on a red dog."),
    ("swap_nouns", "A red dog sits on a blue mat."),  # the caption itself
    ("add_nouns", "A red dog and a cat sit on a blue mat."),  # nobody asked for it
]
SENTENCES = [json.dumps(dict([pair])) for pair in NEGATIVES] + ["Sure! Here it is: ", "I will not do that. "]
CHAT = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"


def save(folder: Path, seed: int = 0, context: int = 8192, chat: bool = True) -> Path:
    """Writes model and tokenizer below `folder`; the same seed gives the same bytes."""
    prepare()
    import torch
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    words = tiny_llava.tokenizer(context, SENTENCES)
    words.chat_template = CHAT if chat else None
    config = MistralConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=len(words),
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=context,
        sliding_window=None,
        initializer_range=0.4,  # large, or the caption would not change what it says
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(config).eval()
    allowed = {*words.convert_tokens_to_ids(SENTENCES), words.eos_token_id}
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        suppress_tokens=[token for token in range(len(words)) if token not in allowed],
        no_repeat_ngram_size=1,
        do_sample=True,
        temperature=0.9,
        top_k=8,
        top_p=0.95,
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return Path(folder)
