"""Greedy answers of the model in autoregressive mode, for the items of `TokenizedShards` or any dict like them."""

import numpy as np
import torch


def answer_batch(model, tokenizer, collate, items, max_tokens):
    """The model's answer to the question of every item: list of str. Frames as given, one left-padded batch."""
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
    device = next(model.parameters()).device
    batch = {name: value if value is None else value.to(device) for name, value in batch.items()}
    options = {
        "max_new_tokens": max_tokens,
        "do_sample": False,
        "pad_token_id": collate.pad_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return [
        text.strip() for text in tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
    ]


def up_to_answer(item):
    """The item without its last answer, which is the model's to give."""
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
    """What the user asks last, as text, out of the chat: the words between the last `user` line and its end-of-turn
    token."""
    chat = tokenizer.decode(item["input_ids"][: answer_span(item)[0]], skip_special_tokens=False)
    return chat.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0].strip()
