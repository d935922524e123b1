"""Greedy answers of the model for items of `TokenizedShards` (or dicts with the same keys)."""

import copy

import numpy as np
import torch


def answer_batch(model, tokenizer, collate, items, max_tokens, mode="autoregressive"):
    """The model's answer to the question of every item: list of str. The items form one left-padded batch."""
    batch = to_device(prompt_batch(collate, items), model)
    options = {
        "max_new_tokens": max_tokens,
        "do_sample": False,
        "pad_token_id": collate.pad_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return as_text(tokenizer, model.generate(**batch, mode=mode, **options))


def prompt_batch(collate, items):
    """The items without their last answers, left-padded: `generate`'s input_ids, attention_mask [B, S], num_frames
    [B], pixel_values and target_patches (None without frames; target_patches also None if the items have none)."""
    rows = [collate([up_to_answer(item)]) for item in items]
    length = max(row["input_ids"].shape[1] for row in rows)
    pad = {"input_ids": collate.pad_id, "attention_mask": 0}
    batch = {
        name: torch.cat(
            [torch.nn.functional.pad(row[name], (length - row[name].shape[1], 0), value=value) for row in rows]
        )
        for name, value in pad.items()
    }
    batch["num_frames"] = torch.cat([row["num_frames"] for row in rows])
    shown = [row for row in rows if len(row["pixel_values"])]
    for name in ("pixel_values", "target_patches"):
        batch[name] = torch.cat([row[name] for row in shown]) if shown and name in shown[0] else None
    return batch


def to_device(batch, model):
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value if value is None else value.to(device) for name, value in batch.items()}


@torch.no_grad()
def embedded_prompts(model, batch, mode="autoregressive", generator=None):
    """`prompt_batch`'s prompts as input embeddings [B, S, E] of the language model. Encodes the frames once."""
    visual_tokens = None
    if batch["pixel_values"] is not None:
        frames = {name: batch[name] for name in ("pixel_values", "num_frames", "target_patches")}
        passes = model.encode_frames(
            batch["input_ids"], batch["attention_mask"], mode=mode, generator=generator, **frames
        )
        visual_tokens = passes[-1].visual_tokens
    return model.embed(batch["input_ids"], visual_tokens)


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
    """The text of the last user turn of the chat."""
    chat = tokenizer.decode(item["input_ids"][: answer_span(item)[0]], skip_special_tokens=False)
    return chat.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0].strip()
