"""Log-likelihood of given answers: one forward pass over the prompt, then all answers on its key-value cache.

Shapes: A answers, S tokens of the prompt (visual ones included), L tokens of the longest answer, E language width,
V vocabulary.
"""

import torch
from transformers import DynamicCache

from pipeline_steps.common.errors import UserError


def answer_ids(tokenizer, prompt, answer, where):
    """Token ids of the text `answer` after the token ids `prompt`, without the end-of-turn token.

    The answer is tokenized together with the prompt from its last control token on, which gives the same ids as
    tokenizing the whole chat. UserError, prefixed with `where`, if the tokenizer merges the prompt's end with the
    answer's start.
    """
    tail = list(prompt[last_control_token(tokenizer, prompt) :])
    text = tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ids = tokenizer(text + answer, add_special_tokens=False, verbose=False)["input_ids"]
    if ids[: len(tail)] != tail or len(ids) == len(tail):
        raise UserError(
            f"{where}: the tokenizer merges the answer {answer!r} with the prompt's end {text!r}. Correct the "
            "answer in its source."
        )
    return ids[len(tail) :]


def last_control_token(tokenizer, ids):
    """Index of the last control token in `ids`, such as the one that opens the answer's turn; 0 if there is none."""
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    return max((place for place, number in enumerate(ids) if number in control), default=0)


def check_answer_fits(config, where, num_prompt, num_answer):
    """UserError if prompt and longest answer (both in tokens) exceed the language model's context length."""
    limit = config.text_config.max_position_embeddings
    if num_prompt + num_answer > limit:
        raise UserError(
            f"{where}: prompt with frames ({num_prompt} tokens) plus longest answer ({num_answer}) exceed the language "
            f"model's context of {limit} tokens. Remove the item, or lower shards.max_frames or, if the answer is "
            "generated, evaluation.max_answer_tokens."
        )


@torch.inference_mode()
def answer_log_probs(model, prompt, answers):
    """Log-probability of every token of each answer, given the prompt and the answer's tokens before it.

    prompt: embeddings [1, S, E] of the whole prompt, visual tokens included, no padding. answers: A lists of
    token ids. Returns (A float64 tensors, one entry per token; A bool: every token is the most likely one).
    """
    language, device, longest = model.language_model, prompt.device, max(map(len, answers))
    ids = torch.zeros(len(answers), longest, dtype=torch.int64)  # [A, L]
    for row, answer in zip(ids, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    lengths = torch.tensor([len(answer) for answer in answers])
    cache = DynamicCache(config=model.config.text_config)
    hidden = language.model(inputs_embeds=prompt, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    hidden = hidden.expand(len(answers), -1, -1)  # [A, 1, E]: predicts the first token of each answer
    if longest > 1:
        cache.batch_repeat_interleave(len(answers))
        size = prompt.shape[1]
        read = torch.arange(longest - 1) < (lengths - 1)[:, None]  # [A, L - 1]
        mask = torch.cat([torch.ones(len(answers), size, dtype=torch.int64), read.long()], dim=1)
        after = language.model(
            inputs_embeds=language.get_input_embeddings()(ids[:, :-1].to(device)),
            attention_mask=mask.to(device),
            position_ids=(size + torch.arange(longest - 1)).expand(len(answers), -1).to(device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden, after], dim=1)  # [A, L, E]
    logits = language.lm_head(hidden).double()  # [A, L, V]
    log_probs = logits.log_softmax(-1).gather(-1, ids.to(device)[..., None])[..., 0].cpu()
    most_likely = logits.argmax(-1).cpu() == ids
    pairs = [(row[:length], hits[:length]) for row, hits, length in zip(log_probs, most_likely, lengths, strict=True)]
    return [row for row, _ in pairs], [bool(hits.all()) for _, hits in pairs]
