"""Multiple choice with three scoring methods; baselines: chance level and the blind model (grey frames).

The options come from the packed sample's fields. The frames of an item are encoded once and shared by all scorings.
Scores of options do not include the end-of-turn token, which says nothing about the option:

letter       log-probability of the option's letter
likelihood   log-probability of the option's text, divided by its number of tokens
generation   the greedy answer, up to its end-of-turn token, is the letter, the option's text, or `A. text`
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from pipeline_steps.common import choices
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.metrics import SCORINGS, ChoiceScore, MultipleChoice
from pipeline_steps.evaluation import statistics
from pipeline_steps.inference import answers
from pipeline_steps.inference.likelihood import answer_ids, answer_log_probs, check_answer_fits
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.streaming.prefetch import map_ordered

NO_OPTION = -1  # the choice of a generated answer that matches no option


@dataclass(frozen=True)
class Question:
    """One item with options. letters, texts: token ids of each answer after the prompt, without end-of-turn token."""

    number: int  # of the item in the dataset
    options: tuple[str, ...]
    correct: int
    letters: list[list[int]]
    texts: list[list[int]]


def questions(dataset, tokenizer, numbers):
    """The Questions among the items `numbers`. UserError if the tokenizer merges an option with its question, or if an
    item was tokenized with a different rendering of its options."""
    found = []
    for number in numbers:
        row = dataset.rows[number]
        item = dataset.sample(number).items[row["item"]]
        if item.options is not None:
            found.append(_question(tokenizer, number, row, item))
    return found


def _question(tokenizer, number, row, item):
    where = f"sample '{row['key']}', item {row['item']}"
    start, stop = answers.answer_span(row)
    prompt = row["input_ids"][:start]
    options = tuple(option.strip() for option in item.options)
    letters, texts = (
        [answer_ids(tokenizer, prompt, answer, where) for answer in given]
        for given in (choices.LETTERS[: len(options)], options)
    )
    stop -= 1  # of the answer, without its end-of-turn token
    if letters[item.correct_option] != list(row["input_ids"][start:stop]):
        raise UserError(
            f"{where}: the answer is {tokenizer.decode(row['input_ids'][start:stop])!r} in its tokens, but "
            f"{choices.LETTERS[item.correct_option]!r} by its options. Run `dvc repro tokens`."
        )
    return Question(number, options, item.correct_option, letters, texts)


def measure(model, tokenizer, collate, dataset, chosen, settings, prefetch):
    """`score` of the Questions among the items {task: item numbers}; settings: section `evaluation`. None without
    Questions."""
    asked = questions(dataset, tokenizer, [number for numbers in chosen.values() for number in numbers])
    if not asked:
        return None
    with progress_bar("multiple choice", total=len(asked), unit="item") as progress:
        return score(
            model,
            tokenizer,
            collate,
            dataset,
            asked,
            batch_size=settings.batch_size,
            max_tokens=settings.max_answer_tokens,
            seed=settings.seed,
            prefetch=prefetch,
            progress=progress,
        )


def score(model, tokenizer, collate, dataset, asked, *, batch_size, max_tokens, seed, prefetch, progress):
    """DataFrame with one row per Question of `asked`, sorted by source, task, key and item.

    Columns: key, item, source, task, num_options, correct; for every scoring chosen_NAME (option number;
    generation: -1 if the answer matches none); letter_scores and likelihood_scores (nats, one
    entry per option), answer (the generated text); and each of these with the prefix blind_, for grey frames (the same
    values for items without frames).
    """
    by_number = {question.number: question for question in asked}
    # leave room for the longest option, which generation could not choose otherwise
    max_tokens = max([max_tokens, *(len(ids) + 1 for question in asked for ids in question.texts)])
    numbers = sorted(by_number)
    jobs = [("", numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]

    def load(job):
        items = [dataset[number] for number in job[1]]
        return job[1], items, answers.prompt_batch(collate, items)

    rows = []
    for batch_numbers, items, batch in map_ordered(load, jobs, **prefetch):
        batch = batch.to(model.device)
        own = [by_number[number] for number in batch_numbers]
        known = [_known(question, item) for question, item in zip(own, items, strict=True)]
        answered = answer_questions(model, tokenizer, batch, own, known, max_tokens, seed)
        blind = answered
        if len(batch.pixel_values):
            blank = replace(batch, pixel_values=torch.zeros_like(batch.pixel_values))
            blind = answer_questions(model, tokenizer, blank, own, known, max_tokens, seed)
        for row, shown, hidden in zip(known, answered, blind, strict=True):
            rows.append(row | shown | {f"blind_{name}": value for name, value in hidden.items()})
        progress.update(len(items))
    return pd.DataFrame(rows).sort_values(["source", "task", "key", "item"], ignore_index=True)


def _known(question, item):
    return {
        **{name: item[name] for name in ("key", "item", "source", "task")},
        "num_options": len(question.options),
        "correct": question.correct,
    }


def answer_questions(model, tokenizer, batch, asked, known, max_tokens, seed):
    """One dict per Question of a `prompt_batch`: the choice of each scoring, the scores, and the generated answer."""
    mask = batch.attention_mask
    options = answers.seeded_options(batch, seed)
    embeddings = answers.embedded_prompts(model, batch.inputs(), options=options)  # frames are encoded once
    sizes = mask.sum(1).tolist()
    for row, size in zip(known, sizes, strict=True):
        check_answer_fits(model.config, f"sample '{row['key']}', item {row['item']}", size, max_tokens)
    generated = answers.generate_after(model, tokenizer, embeddings, mask, max_new_tokens=max_tokens)
    rows = []
    for question, prompt, size, text in zip(asked, embeddings, sizes, generated, strict=True):
        letters, texts = option_scores(model, prompt[None, -size:], question)
        rows.append(
            {
                "chosen_letter": int(np.argmax(letters)),
                "chosen_likelihood": int(np.argmax(texts)),
                "chosen_generation": option_of(text, question.options),
                "letter_scores": [round(score, 6) for score in letters],
                "likelihood_scores": [round(score, 6) for score in texts],
                "answer": text,
            }
        )
    return rows


def option_scores(model, prompt, question):
    """(letter scores, likelihood scores) of a Question after its embedded prompt [1, S, E]: lists, one per option."""
    count = len(question.options)
    log_probs, _ = answer_log_probs(model, prompt, question.letters + question.texts)
    return [row.sum().item() for row in log_probs[:count]], [row.mean().item() for row in log_probs[count:]]


def option_of(answer, options):
    """The number of the option that a generated answer matches, or NO_OPTION. An answer matches by letter, by text, or
    by "A. text" as the question shows it. The case of texts and one trailing full stop are ignored. If options have the
    same text, the first one wins."""
    answer, letters, texts = _plain(answer), choices.LETTERS[: len(options)], [*map(_plain, options)]
    shown = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    forms = {text.casefold(): number for named in (shown, texts) for number, text in reversed([*enumerate(named)])}
    if answer in {*letters}:
        return letters.index(answer)
    return forms.get(answer.casefold(), NO_OPTION)


def _plain(text):
    return text.strip().removesuffix(".").rstrip()


def summarise(table, num_samples, seed):
    """{'source/task': MultipleChoice} of a table of `score`, and all items together under 'all'."""
    groups = {f"{source}/{task}": rows for (source, task), rows in table.groupby(["source", "task"])}
    return {name: _summary(rows, num_samples, seed) for name, rows in ({"all": table} | groups).items()}


def _summary(rows, num_samples, seed):
    return MultipleChoice(
        num_items=len(rows),
        chance=float((1 / rows["num_options"]).mean()),
        scorings={name: _choice_score(rows, name, num_samples, seed) for name in SCORINGS},
        no_option=float((rows["chosen_generation"] == NO_OPTION).mean()),
        blind_no_option=float((rows["blind_chosen_generation"] == NO_OPTION).mean()),
        letters={
            name: letter_shares(rows[column], rows["num_options"].max())
            for name, column in (("correct", "correct"), *((name, f"chosen_{name}") for name in SCORINGS))
        },
        position_bias={name: position_bias(rows[f"chosen_{name}"], rows["correct"]) for name in SCORINGS},
    )


def _choice_score(rows, name, num_samples, seed):
    correct = rows["correct"].to_numpy()
    hits, blind = ((rows[f"{which}chosen_{name}"].to_numpy() == correct).astype(float) for which in ("", "blind_"))
    ones, clips = np.ones(len(rows)), rows["source"] + "/" + rows["key"]
    return ChoiceScore(
        accuracy=float(hits.mean()),
        interval=statistics.ratio_interval(hits, ones, num_samples, seed, clips),
        blind=float(blind.mean()),
        blind_interval=statistics.ratio_interval(blind, ones, num_samples, seed, clips),
        gain=float((hits - blind).mean()),
        gain_interval=statistics.ratio_interval(hits - blind, ones, num_samples, seed, clips),
    )


def letter_shares(chosen, num_options):
    """{letter: share of the items that choose it}; the rest chose no option."""
    counts = np.bincount(chosen[chosen >= 0], minlength=num_options)
    return {choices.LETTERS[number]: float(count / len(chosen)) for number, count in enumerate(counts)}


def position_bias(chosen, correct):
    """Total variation distance, 0..1, between the distributions of chosen and of correct letters, over the items that
    choose an option. 0: no preference. None if no item chooses an option."""
    chosen, correct = np.asarray(chosen), np.asarray(correct)
    made = chosen >= 0
    if not made.any():
        return None
    longest = int(max(chosen[made].max(), correct[made].max())) + 1
    shares = [np.bincount(values[made], minlength=longest) / made.sum() for values in (chosen, correct)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
