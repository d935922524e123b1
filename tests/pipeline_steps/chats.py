"""Small tokenizers in published formats, parameters of the tokens stage, and spans found by another way than the
stage's."""

from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline_steps.common.schemas import PackedSample
from pipeline_steps.tokens.schema import Section

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nDefault line<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = CHATML.replace("Default line", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
ZEPHYR = (  # roles are ordinary text, no default system line
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM2_TOKENS = [*CHATML_TOKENS, "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>"]
SMOLLM2_TOKENS += ["<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>"]
SMOLLM2_TOKENS += ["<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]
FORMATS = {
    "chatml": (CHATML, CHATML_TOKENS, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "smollm2": (SMOLLM2, SMOLLM2_TOKENS, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}),
}
SECTION = {
    "max_tokens": 64,
    "max_dropped": 0.5,
    "prompts": [
        {
            "source": "*",
            "system": "Watch.",
            "video": "Describe the video.",
            "image": "Describe the picture.",
            "choice": "Answer with the letter.",
        }
    ],
}


def make_section(*entries, **changes):
    """SECTION with further entries in its table; `system` among the changes is that of the entry for all sources."""
    system = changes.pop("system", "Watch.")
    empty = {"system": None, "video": None, "image": None, "choice": None}
    prompts = [SECTION["prompts"][0] | {"system": system}, *(empty | entry for entry in entries)]
    return Section(**{**SECTION, "prompts": tuple(prompts), **changes})


def save_tokenizer(folder, name):
    """A byte-level BPE of SmolLM2's format: single digits, the special tokens and the chat template of FORMATS."""
    template, special_tokens, options = FORMATS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "system\nWatch.\nuser\nWhich digits does red show? Describe the video.\nassistant\nred: grey top left"
    tokenizer.train_from_iterator([text] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **options).save_pretrained(folder)
    return folder


def packed(*items, key="k", source="s", kind="text", frame_count=0):
    """A sample with these items as the shards stage packs it, without its media."""
    media = {} if kind == "text" else {"path": "a", "sha256": "x"}
    rest = {"split": "train", "timestamps": (), "duration": 0.0, "width": 0, "height": 0}
    return PackedSample(
        key=key, source=source, video_id="v", kind=kind, items=items, frame_count=frame_count, **media, **rest
    )


def turns(*contents, system=None):
    """The messages of a chat: user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    lines = [*([("system", system)] if system else []), *zip(roles, contents, strict=False)]
    return [{"role": role, "content": content} for role, content in lines]


def template_ids(tokenizer, messages):
    """The ids of the tokenizer's own chat template, less the line break after the last end-of-turn token."""
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids[-len(line_break) :] == line_break
    return ids[: -len(line_break)]


def template_spans(tokenizer, messages):
    """(start, stop) of every answer with its end-of-turn token: what the template adds to the chat that asks for it."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True)["input_ids"]
            spans.append((len(before), len(template_ids(tokenizer, messages[: number + 1]))))
    return spans


def mask_of(spans, length):
    return [any(start <= i < stop for start, stop in spans) for i in range(length)]


def spans_of(mask):
    """The runs of True."""
    edges = [i for i, (one, other) in enumerate(pairwise([False, *mask, False])) if one != other]
    return list(zip(edges[::2], edges[1::2], strict=True))
