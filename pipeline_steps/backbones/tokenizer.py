"""A byte-level BPE tokenizer in SmolLM2's format, trained on the sentences of the procedural world.

Pre-tokenizer (single digits, then GPT-2's byte-level split), decoder, special tokens and chat template are those of
SmolLM2-Instruct, so a pretrained tokenizer is a drop-in replacement. As in SmolLM2, a space before a digit is its own
token: "red: 31415" takes 8 tokens, "red: 3 1 4 1 5" takes 12.
"""

import itertools
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline_steps.world import digits as world

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WORLD_SENTENCES = (
    "system\nYou watch videos.",
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "user\nWhich digits does the card's colour show?",
    "user\nWhich digits show where the box was?",
    "user\nWhich digits does {colour} show?",
    "user\nWhich digits show at the {place}?",
    "user\nWhat is in the picture?",
    "user\nWhat is in the video?",
    "user\nWhat is the background and how many digits are there?",
    "user\nDescribe the video.",
    "user\nDescribe the picture.",
    "user\nSay 314 backwards",
    "user\nWhich digit comes after 3 in 314?",
    "user\nWhich digit is the largest of 314?",
    "assistant\n{colour}: 31415",
    "assistant\n{place}: 31415",
    "assistant\n{background}, 3",
    "assistant\n{colour} 3, {colour} 1, {colour} 4 in the {place}",
)
SUBJECTS = ("A person", "The child", "My friend", "A small dog", "The old car", "One man", "A woman", "The camera")
VERBS = ("walks", "is looking", "moves", "turns", "is sitting", "plays", "was standing", "stops", "will run")
SETTINGS = ("in front of a house", "on the street", "over the water", "with a ball", "at night", "from left to right")
# copies of each world sentence: its words get merges first, English words share the rest of the vocabulary
WORLD_COPIES = 2400


def training_text() -> list[str]:
    """The training corpus: many copies of the world's sentences, and simple English sentences once each."""
    choices = {"colour": world.COLOUR_NAMES, "place": world.PLACES, "background": world.BACKGROUND_NAMES}
    sentences = []
    for sentence in WORLD_SENTENCES:
        used = [name for name in choices if "{" + name + "}" in sentence]
        filled = [
            sentence.format(**dict(zip(used, values, strict=True)))
            for values in itertools.product(*(choices[name] for name in used))
        ]
        sentences += filled * (WORLD_COPIES // len(filled))
    english = [f"{s} {v} {p}." for s, v, p in itertools.product(SUBJECTS, VERBS, SETTINGS)]
    return sentences + english


def train_tokenizer(vocabulary_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocabulary_size` tokens: 3 special tokens, the 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(folder)
