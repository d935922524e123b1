"""Scores the trained model on held-out items, with its controls.

    python -m pipeline_steps.evaluation

Reads params.yaml, outputs/stage3, data/shards and data/tokens. Writes outputs/metrics/evaluation.json
(explained by `python -m pipeline_steps.common.reference --results`) and outputs/evaluation/: items.parquet, one row per
item and mode, answers.jsonl with greedy answers, captions.jsonl with free-form answers in several modes, if clips are
long enough caption_parts.jsonl with such answers for parts of them, and, if items have options, choices.parquet, one
row per item.
Modes: coarse, fine, autoregressive; controls in autoregressive mode: blind (grey frames) and random_query (random
queries with the norm of the planned ones). The controls of controls.py run on fewer items; parts of clips
(temporal.py), automated checks (diagnostics.py) and other temperatures (temperature_sweep.py) on fewer clips. Cost at
the embedded scale: about a minute on two cores, below 1 GB of memory. Output is deterministic: equal inputs give equal
bytes.
"""

import argparse
import os
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

os.environ.setdefault(
    "MKL_DYNAMIC", "FALSE"
)  # a fixed number of threads keeps floating-point sums reproducible under load

import numpy as np
import pandas as pd
import torch
import transformers

from pipeline_steps.common import metrics, modes, params
from pipeline_steps.common.checkpoint import load_checkpoint
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import check_outputs, replaced_folder, write_jsonl
from pipeline_steps.common.hashing import fingerprint, sha256_file
from pipeline_steps.common.names import NEW
from pipeline_steps.evaluation import (
    breakdown,
    caption_parts,
    captions,
    controls,
    gaze_difference,
    multiple_choice,
    next_frame,
    preliminary,
    statistics,
    subset_evals,
    temporal,
)
from pipeline_steps.evaluation.scoring import TEXT, choose_items, for_file, groups_by_task, prefetch, score_items
from pipeline_steps.inference import gaze
from pipeline_steps.inference.answers import answer_batch, expected_answer, question, up_to_answer
from pipeline_steps.inference.likelihood import check_answer_fits
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards

PARAMS = ("evaluation", "streaming.image_replication")


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    settings = parameters.evaluation
    check_outputs(folders=[arguments.outputs], files=[arguments.metrics / "evaluation.json"])
    torch.set_num_threads(settings.num_threads)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_model(arguments.checkpoint)
    replication = parameters.streaming.image_replication
    dataset = TokenizedShards.for_model(model.config, arguments.shards, arguments.tokens, settings.split, replication)
    training = TokenizedShards(arguments.shards, arguments.tokens, "train")
    chosen = choose_items(dataset, settings.max_items_per_task, settings.seed)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=replication)

    total = sum(len(numbers) + min(len(numbers), settings.max_answers_per_task) for numbers in chosen.values())
    total += sum(len(numbers) for part in subset_evals.choose(dataset, chosen, settings) for numbers in part.values())
    loading = prefetch(parameters.runtime, dataset, collate)
    check_answers_fit(model.config, tokenizer, collate, dataset, chosen, settings)
    captions.check_packages(dataset, chosen, tokenizer, settings)
    predictor = next_frame.load_predictor(arguments.checkpoint, model)
    with progress_bar("evaluation", total=total, unit="item") as progress:
        table = score_items(
            model,
            collate,
            dataset,
            chosen,
            batch_size=settings.batch_size,
            seed=settings.seed,
            prefetch=loading,
            progress=progress,
        )
        more = subset_evals.measure(model, collate, dataset, chosen, settings, loading, progress)
        table = pd.concat([table, more.controls], ignore_index=True)
        answers = []
        for task, numbers in chosen.items():
            items = [dataset[number] for number in numbers[: settings.max_answers_per_task]]
            for start in range(0, len(items), settings.batch_size):
                batch = items[start : start + settings.batch_size]
                answers += answer_rows(model, tokenizer, collate, task, batch, settings.max_answer_tokens)
                progress.update(len(batch))
    next_frame_result = predictor and next_frame.measure(model, predictor, collate, dataset, chosen, settings, loading)
    choice_table = multiple_choice.measure(model, tokenizer, collate, dataset, chosen, settings, loading)
    free_answers, objects = captions.measure(model, tokenizer, collate, dataset, chosen, settings, loading)
    part_answers, lengths = caption_parts.measure(model, tokenizer, collate, dataset, chosen, settings, loading)
    result = summarise(
        table,
        answers,
        chance(training, dataset, chosen),
        settings,
        provenance(arguments, parameters, model.device),
        views=more.views,
        diagnostics=subset_evals.diagnose(model, more.observed, table, arguments.metrics),
    )
    if choice_table is not None:
        result.multiple_choice = multiple_choice.summarise(choice_table, settings.bootstrap_samples, settings.seed)
    result.next_frame = next_frame_result
    result.preliminary = preliminary.collect(model, more.observed, more.temperatures, next_frame_result)
    result.captions = captions.summarise(free_answers, objects, settings.bootstrap_samples, settings.seed)
    result.caption_parts = caption_parts.summarise(part_answers, lengths, settings)
    with replaced_folder(arguments.outputs) as folder:
        if choice_table is not None:
            choice_table.to_parquet(folder / "choices.parquet", index=False)
        for_file(table).to_parquet(folder / "items.parquet", index=False)
        write_jsonl(folder / "answers.jsonl", answers)
        write_jsonl(folder / "captions.jsonl", free_answers)
        if part_answers:
            write_jsonl(folder / "caption_parts.jsonl", part_answers)
    metrics.write_json(arguments.metrics / "evaluation.json", result)
    print_summary(result)
    subset_evals.print_checks(result)


def read_arguments():
    parser = argparse.ArgumentParser(description="Score the trained model on held-out items.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs/evaluation"))
    parser.add_argument("--metrics", type=Path, default=Path("outputs/metrics"))
    return parser.parse_args()


def load_model(checkpoint):
    """(model, tokenizer) of a checkpoint folder, in fp32, on the GPU if there is one."""
    model, processor = load_checkpoint(checkpoint)
    return model.to(choose_device()), processor.tokenizer


def check_answers_fit(config, tokenizer, collate, dataset, chosen, settings):
    """UserError for an item whose generated answer may exceed the language model's context, before any is scored."""
    free = captions.choose(dataset, chosen, tokenizer, settings.caption_min_words, settings.max_captions_per_task)
    for number in chain(*(own[: settings.max_answers_per_task] for own in chosen.values()), *free.values()):
        row = dataset.rows[number]
        where, size = f"sample '{row['key']}', item {row['item']}", collate.sequence_length(up_to_answer(row))
        check_answer_fits(config, where, size, settings.max_answer_tokens)


def chance(training, dataset, chosen):
    """{task: accuracy of the training split's most frequent token per answer position, of a task about held-out names
    those of the task about trained ones, or None if that split has no such task}."""
    training_tokens = answer_tokens(training, groups_by_task(training))
    answers = answer_tokens(dataset, chosen)
    trained = {task: training_tokens.get(task, training_tokens.get(task.removesuffix(NEW), {})) for task in chosen}
    guesses = {task: statistics.most_frequent_tokens(tokens) for task, tokens in trained.items()}
    return {
        task: statistics.chance_accuracy(guesses[task], answers[task]) if guesses[task] else None for task in chosen
    }


def answer_tokens(dataset, groups):
    """{name: {(position in the answer, token id): count}} for the scored tokens of groups {name: item numbers}."""
    group_of = np.full(len(dataset), -1)
    for code, numbers in enumerate(groups.values()):
        group_of[numbers] = code
    counts = [Counter() for _ in groups]
    for numbers, places, ids in dataset.scored_tokens():
        triples = np.stack([group_of[numbers], places, ids])[:, group_of[numbers] >= 0]
        for (code, place, token), count in zip(*distinct(triples), strict=True):
            counts[code][place, token] += count
    return dict(zip(groups, counts, strict=True))


def distinct(columns):
    """The unique columns of an integer array [c, n], as tuples, and the count of each."""
    values, counts = np.unique(columns, axis=1, return_counts=True)
    return list(map(tuple, values.T.tolist())), counts.tolist()


def answer_rows(model, tokenizer, collate, task, items, max_tokens):
    """Rows of answers.jsonl: {key, item, task, question, expected, generated}."""
    generated = answer_batch(model, tokenizer, collate, items, max_tokens)
    return [
        {
            "key": item["key"],
            "item": item["item"],
            "task": task,
            "question": question(tokenizer, item),
            "expected": expected_answer(tokenizer, item),
            "generated": text,
        }
        for item, text in zip(items, generated, strict=True)
    ]


def summarise(table, answers, chance_accuracy, settings, origin, *, views=None, diagnostics=None):
    """`EvaluationResult` of the item table and the answers. views: table of `temporal`; diagnostics: `Diagnostics`;
    None: not measured."""
    options = {"num_samples": settings.bootstrap_samples, "seed": settings.seed}
    interval = partial(statistics.ratio_interval, **options)
    tasks, gaps, gazes = {}, {}, {}
    for (task, mode), rows in table.groupby(["task", "mode"], sort=True):
        tasks.setdefault(task, {})[mode] = score_rows(rows, options)
        if "gaze_frames" in rows and (measured := gaze.aggregate(rows, interval)):
            gazes.setdefault(task, {})[mode] = measured
    text = tasks.pop(TEXT, {}).get(TEXT)
    for task in tasks:
        sums = table[table["task"] == task].pivot(index=["key", "item"], columns="mode", values="loss_sum")
        gaps[task] = statistics.gap(
            sums["autoregressive"].to_numpy(),
            sums["fine"].to_numpy(),
            clips=sums.index.get_level_values("key"),
            **options,
        )
    in_all = [mode for mode in modes.subset_controls() if all(mode in scores for scores in tasks.values())]
    mean = {
        mode: metrics.MeanScore(
            loss=float(np.mean([scores[mode].loss for scores in tasks.values()])),
            accuracy=float(np.mean([scores[mode].accuracy for scores in tasks.values()])),
        )
        for mode in (*modes.SCORED_MODES, *in_all)
    }
    matches = {}
    for answer in answers:
        matches.setdefault(answer["task"], []).append(answer["generated"] == answer["expected"])
    generation = {
        name: metrics.Generation(exact_match=float(np.mean(hits)), num_items=len(hits))
        for name, hits in matches.items()
    }
    return metrics.EvaluationResult(
        tasks=tasks,
        mean=mean,
        gap=gaps,
        text=text,
        chance=chance_accuracy,
        gaze=gazes,
        generation=generation,
        mean_exact_match=mean_exact_match(generation, tasks),
        provenance=origin,
        sources=breakdown.source_scores(table, partial(score_rows, options=options)),
        controls=controls.effects(table, interval),
        gaze_difference=gaze_difference.differences(table, interval),
        per_frame=breakdown.frame_scores(table),
        temporal=None if views is None else temporal.aggregate(views, interval),
        diagnostics=diagnostics,
    )


def mean_exact_match(generation, tasks):
    """Mean exact match over the `tasks` with answers, which have frames; None without answers."""
    found = [generation[task].exact_match for task in tasks if task in generation]
    return float(np.mean(found)) if found else None


def score_rows(rows, options):
    """`Score` of rows of the item table. options: keyword arguments of `statistics.score`."""
    columns = (rows[name].to_numpy() for name in ("loss_sum", "num_correct", "num_tokens"))
    return statistics.score(*columns, clips=rows["key"], **options)


def provenance(arguments, parameters, device):
    """Inputs that determine the results; equal for two runs with equal inputs."""
    weights = sorted(arguments.checkpoint.glob("*.safetensors"))
    return {
        "checkpoint_sha256": sha256_file(weights[0]) if len(weights) == 1 else fingerprint(*weights),
        "shards_sha256": sha256_file(arguments.shards / "manifest.json"),
        "tokens_sha256": sha256_file(arguments.tokens / "manifest.json"),
        "parameters_sha256": fingerprint(parameters.as_dict()),
        "split": parameters.evaluation.split,
        "evaluation_seed": parameters.evaluation.seed,
        "num_threads": parameters.evaluation.num_threads,
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_summary(result):
    """Prints the accuracies as a table."""
    columns = (*modes.SCORED_MODES, "chance")
    print("accuracy".ljust(14) + "".join(name.rjust(16) for name in columns))
    for task, scores in result.tasks.items():
        shares = [scores[mode].accuracy for mode in modes.SCORED_MODES] + [result.chance[task]]
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        print(task.ljust(14) + "".join(cell.rjust(16) for cell in cells))
    print("mean".ljust(14) + "".join(f"{result.mean[mode].accuracy:.1%}".rjust(16) for mode in modes.SCORED_MODES))
    for group, found in result.multiple_choice.items():
        shares = [(name, score.accuracy) for name, score in found.scorings.items()]
        shares += [(f"blind {name}", score.blind) for name, score in found.scorings.items()]
        listed = ", ".join(f"{name} {share:.1%}" for name, share in [*shares, ("chance", found.chance)])
        print(f"multiple choice, {group} ({found.num_items}): {listed}")


if __name__ == "__main__":
    run_main(main)
