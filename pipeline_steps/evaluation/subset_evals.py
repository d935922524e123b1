"""Measurements on a subset of the items: controls, parts of clips, and attention probes."""

import csv
from dataclasses import dataclass

import pandas as pd

from pipeline_steps.common.diagnostic_results import TemperatureScore
from pipeline_steps.common.params import TRAINING_STAGES
from pipeline_steps.evaluation import attention_probes, controls, diagnostics, temperature_sweep, temporal
from pipeline_steps.evaluation.scoring import batches, drawn, subset
from pipeline_steps.streaming.index import KINDS

VIDEO = KINDS.index("video")


@dataclass(frozen=True)
class SubsetResults:
    controls: pd.DataFrame  # item table
    views: pd.DataFrame | None  # from `temporal.score_views`; None: not measured
    observed: attention_probes.ProbeResults | None
    temperatures: list[TemperatureScore]  # of the clips of `observed`


def choose(dataset, chosen, settings):
    """Three dicts {task: item numbers}, subsets of the scored items: for the controls, the parts of clips and the
    diagnostics, whose limit is divided among the tasks. settings: section `evaluation`."""
    clips = {name: [n for n in numbers if dataset.index.kind[n] == VIDEO] for name, numbers in chosen.items()}
    clips = {name: numbers for name, numbers in clips.items() if numbers}
    share, rest = divmod(settings.max_diagnostic_clips, max(1, len(clips)))
    return (
        subset(chosen, settings.max_control_items_per_task, settings.seed),
        subset(clips, settings.max_temporal_clips_per_task, settings.seed),
        {name: drawn(own, share + (place < rest), settings.seed) for place, (name, own) in enumerate(clips.items())},
    )


def measure(model, collate, dataset, chosen, settings, prefetch, progress):
    """`SubsetResults` of the items that `choose` selects; prefetch: arguments of `streaming.prefetch.map_ordered`."""
    controlled, viewed, probed = choose(dataset, chosen, settings)
    for_controls, for_views, for_probes, for_temperatures = (
        batches(model, collate, dataset, part, settings.batch_size, prefetch)
        for part in (controlled, viewed, probed, probed)
    )
    table = controls.score_controls(model, for_controls, settings.seed, progress)
    views = temporal.score_views(model, collate, for_views, progress)
    observed = attention_probes.observe(model, for_probes, settings.seed, progress)
    temperatures = temperature_sweep.measure(model, for_temperatures)
    return SubsetResults(table, views if settings.max_temporal_clips_per_task else None, observed, temperatures)


def diagnose(model, observed, table, metrics_dir):
    """`Diagnostics` or None; reads stage1.csv to stage3.csv in metrics_dir if they exist."""
    paths = [metrics_dir / f"{stage}.csv" for stage in TRAINING_STAGES]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    rows = [row for text in texts for row in csv.DictReader(text.splitlines())]
    return diagnostics.diagnose(model, observed, table, rows)


def print_checks(result):
    """Prints the failed checks of an `EvaluationResult`."""
    checks = result.diagnostics.checks if result.diagnostics else {}
    for name, check in checks.items():
        if check.verdict == "suspicious":
            bound = f"above {check.high:g}" if check.low is None or check.value >= check.low else f"below {check.low:g}"
            print(f"suspicious: {name} {check.value:.3g} is {bound}: {check.reason}")
