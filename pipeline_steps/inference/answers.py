"""Greedy answers of the model for items of `TokenizedShards` (or dicts with the same keys)."""

import copy

import numpy as np
import torch

from model import FoveationOptions

PROBE = "\N{REPLACEMENT CHARACTER}"


def answer_batch(model, tokenizer, collate, items, max_tokens, mode="autoregressive"):
    """The model's answer to the question of every item: list of str. The items form one left-padded batch."""
    batch = prompt_batch(collate, items).to(model.device)
    options = {
        "max_new_tokens": max_tokens,
        "do_sample": False,
        "pad_token_id": collate.pad_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    foveation = FoveationOptions(target_patches=batch.target_patches)
    return as_text(tokenizer, model.generate(**batch.inputs(), mode=mode, options=foveation, **options))


def seeded_options(batch, seed):
    """FoveationOptions for a batch: its targets, and random queries that are a function of the seed."""
    generator = torch.Generator(batch.input_ids.device).manual_seed(seed)
    return FoveationOptions(generator=generator, target_patches=batch.target_patches)


def prompt_batch(collate, items):
    """The `Batch` of the items without their last answers, left-padded as generation needs it."""
    return collate([up_to_answer(item) for item in items], padding_side="left")


@torch.no_grad()
def embedded_prompts(model, inputs, mode="autoregressive", options=None):
    """Left-padded prompts as input embeddings [B, S, E] of the language model. Encodes the frames once.

    inputs: arguments of `encode_frames` by name, as of `Batch.inputs` or of the processor; options: FoveationOptions.
    """
    passes = model.encode_frames(**inputs, mode=mode, options=options)
    return model.embed(inputs["input_ids"], passes[-1].visual_tokens if passes else None)


@torch.no_grad()
def generate_after(model, tokenizer, embeddings, attention_mask, **options):
    """Text generated after left-padded prompt embeddings [B, S, E]: list of str. options: of Hugging Face's `generate`;
    the default is greedy decoding."""
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = {"do_sample": False, "pad_token_id": pad_id, "eos_token_id": tokenizer.eos_token_id} | options
    settings = copy.deepcopy(model.generation_config)
    others = settings.update(**options)  # options outside GenerationConfig, such as a streamer
    ids = model.language_model.generate(
        inputs_embeds=embeddings, attention_mask=attention_mask, generation_config=settings, **others
    )
    return as_text(tokenizer, ids)


def as_text(tokenizer, ids):
    """Generated ids [B, S] as stripped texts without control tokens."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def up_to_answer(item):
    """The item without its last answer."""
    start = answer_span(item)[0]
    cut = {name: item[name][:start] for name in ("input_ids", "answer_mask", "score_mask")}
    return {**item, **cut}


def answer_span(item):
    """(start, stop) of the last answer in input_ids, end-of-turn token included."""
    mask = np.asarray(item["answer_mask"], bool)
    stop = int(mask.nonzero()[0][-1]) + 1
    before = (~mask[:stop]).nonzero()[0]
    return (int(before[-1]) + 1 if len(before) else 0), stop


def expected_answer(tokenizer, item):
    """The true answer as text."""
    start, stop = answer_span(item)
    return tokenizer.decode(item["input_ids"][start:stop], skip_special_tokens=True).strip()


def question(tokenizer, item):
    """The text of the last user turn of the chat, found by the tokenizer's chat template."""
    turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user", "assistant")]
    _, closing, between, _, end = tokenizer.apply_chat_template(turns, tokenize=False).split(PROBE)
    ids = item["input_ids"][: answer_span(item)[0]]
    chat = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return chat.rstrip().removesuffix(closing.rstrip()).rpartition(between.removeprefix(end))[2].strip()
