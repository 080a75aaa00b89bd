"""A tiny random LLaVA-NeXT in its true format: `python tests/data/tiny_llava.py FOLDER` saves one.

It has never seen a picture. Its generation config lets it write nothing but the sentences below.
"""

import sys
from pathlib import Path

from fast_goal.environment import prepare

SENTENCES = [
    " A red ball lies in the corner.",
    " The tall tree stands near the water.",
    " Two people look to the right.",
    " A wooden table has a rough texture.",
    " Behind them, a grey wall catches the soft light.",
    " On the left, a small dog is next to a blue sign.",
    " The sky is clear.",
    " A white car is parked in front of the house.",
    " The ground is covered with dry leaves.",
    " In the background are low hills.",
    " The sign reads 'Open'.",
    " A striped blanket hangs over the fence.",
    " Light comes in from the left.",
    " The water is calm.",
]
CHAT = (
    "{% for message in messages %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]{% endfor %}"
)
SIDE, PATCH = 32, 8  # pixels


def tokenizer(context: int, sentences: list[str] = SENTENCES):
    """Byte-level, so that every text has tokens; the sentences are tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(sentence, normalized=False) for sentence in sentences])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=context,
    )
    made.padding_side = "right"  # as some published tokenizers have it: the captioner must not rely on it
    return made


def save(folder: Path, seed: int = 0, context: int = 4096) -> Path:
    """Writes model and processor below `folder`; the same seed gives the same bytes."""
    prepare()
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    words = tokenizer(context)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=MistralConfig(
            **sizes,
            vocab_size=len(words),
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=context,
            sliding_window=None,
            initializer_range=0.4,  # large, or the picture would not change what it says
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        initializer_range=0.4,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config).eval()
    allowed = {*words.convert_tokens_to_ids(SENTENCES), words.eos_token_id}
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        suppress_tokens=[token for token in range(len(words)) if token not in allowed],
        no_repeat_ngram_size=1,
        min_new_tokens=3,
        do_sample=True,  # published models sample by default: the captioner must not
        temperature=0.7,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(save(Path(sys.argv[1])))
