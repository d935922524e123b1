"""One training stage: alignment (stage1), instruction tuning (stage2) or video refinement (stage3).

    python -m pipeline_steps.training --stage stage1

Reads params.yaml, data/shards and data/tokens. stage1 starts from `training.init_from`, which is data/backbones or the
folder of a finished checkpoint, every other stage from the checkpoint of the previous one. Writes the model with its
processor, code and model card as a Hugging Face folder to outputs/<stage>, and the learning curves to
outputs/metrics/<stage>.{csv,json}. An interrupted run resumes from its last checkpoint.

Cost at the embedded scale: one to four minutes per stage on two cores, below 1 GB of memory. Requires only torch,
transformers, pyarrow, pydantic and PyYAML. On several devices or machines:

    torchrun --nproc-per-node 4 -m pipeline_steps.training --stage stage1
"""

import argparse
import csv
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A fixed number of threads, and so the same order of additions, on a busy machine too.
os.environ.setdefault("MKL_DYNAMIC", "FALSE")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from model import FoveatedVLMForConditionalGeneration
from pipeline_steps.common import checkpoint, model_card, params
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import (
    check_outputs,
    locked_scratch,
    read_record,
    remove_folder,
    replaced_folder,
    write_json,
    write_text,
)
from pipeline_steps.common.hashing import tokenizer_sha256
from pipeline_steps.common.integrity import write_checksums
from pipeline_steps.common.schemas import ShardsManifest, TokensManifest
from pipeline_steps.monitoring.metrics_logger import MetricsLogger
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.streaming.loader import open_training_split
from pipeline_steps.training import rank_agreement
from pipeline_steps.training.checkpoint_io import run_fingerprint
from pipeline_steps.training.context import TrainContext, announce
from pipeline_steps.training.distributed import DistributedContext, distributed_context, failure_announced
from pipeline_steps.training.objectives import check, term_names
from pipeline_steps.training.objectives import input_files as objective_files
from pipeline_steps.training.parameters import GROUPS, format_table, trainable_parameters
from pipeline_steps.training.train_loop import train

BASE_MODELS = "base_models.json"  # in a checkpoint: from which models its training began
PARAMS = ("seed", "model", "streaming", "training.init_from", "training.common", "training.{stage}")
DIAGNOSTICS = ("attention_entropy", "attention_uniformity", "token_similarity", "coarse_similarity")
COLUMNS = (
    "event",
    "step",
    "samples",
    "tokens",
    "source",
    "task",
    "mode",
    "loss",
    *term_names(),
    "accuracy",
    "grad_norm",
    *(f"grad_norm_{group}" for group in GROUPS),
    "num_plans",
    *(f"lr_{group}" for group in GROUPS),
    *DIAGNOSTICS,
    "message",
)


def main() -> None:
    arguments = read_arguments()
    with failure_announced():
        parameters = params.read(arguments.params, *(key.format(stage=arguments.stage) for key in PARAMS))
        device = choose_device(parameters.training.common.device, "training.common.device")
    with distributed_context(device) as group:
        run_stage(arguments, parameters, group)


def run_stage(arguments: argparse.Namespace, parameters, group: DistributedContext) -> None:
    """Runs a stage in this process: load, train, publish."""
    common, settings = parameters.training.common, getattr(parameters.training, arguments.stage)
    live = live_folder(arguments)
    torch.set_num_threads(common.num_threads)
    transformers_logging.disable_progress_bar()
    torch.manual_seed(parameters.seed)
    started = time.time()
    inputs = rank_agreement.together(group, lambda: check_inputs(arguments, parameters, group.is_main))
    fingerprint = run_fingerprint(arguments.stage, parameters.as_dict(), inputs)
    with shared_scratch(group, arguments.stage, fingerprint) as folder:
        run = rank_agreement.together(group, lambda: prepare_run(arguments, parameters, group, folder))
        run.logger = MetricsLogger(parameters.runtime, arguments.stage, run.num_steps, live, group, common.precision)
        load_heads(start_folder(arguments, parameters), run)
        options = (settings, common.weight_decay, common.optimizer, run.training_model.objective)
        _, table = trainable_parameters(run.model, *options)
        if group.is_main:
            write_json(live / "parameters.json", table)
        devices = f"{group.world_size} x {group.device}" if group.world_size > 1 else group.device
        announce(
            run,
            [
                f"{arguments.stage}: {settings.num_samples:,} samples, {run.num_steps:,} steps on {devices}",
                f"  objectives: {', '.join(objective.name for objective in run.training_model.objectives)}",
                *format_unmatched(run.stage_plan.groups.unmatched),
                format_table(table),
            ],
        )
        try:
            result = train(run)
        finally:
            run.logger.close()
        if group.is_main:
            start = start_folder(arguments, parameters)
            result |= {"parameters": table, "sources": trained_sources(run, start)}
            publish(arguments, start, run, result, time.time() - started)
            remove_folder(folder)
        group.wait()


def live_folder(arguments: argparse.Namespace) -> Path:
    """Folder of the live curves."""
    return arguments.outputs / "live" / arguments.stage


def check_inputs(arguments: argparse.Namespace, parameters, is_main: bool) -> tuple[list[Path], dict[str, object]]:
    """(input files, description of the work for the comparison of the ranks). UserError for parameters that do not fit
    together, missing input files and, in the main process, outputs that cannot be written."""
    settings = getattr(parameters.training, arguments.stage)
    check(arguments.stage, settings, parameters.model)
    if is_main:
        check_outputs(
            folders=[arguments.outputs / arguments.stage, arguments.outputs / "timings", live_folder(arguments)],
            files=[arguments.metrics / f"{arguments.stage}.{suffix}" for suffix in ("csv", "json")],
        )
    start = start_folder(arguments, parameters)
    inputs = input_files(arguments, start, settings)
    if is_checkpoint(start):
        check_tokenizer(start, arguments)
    return inputs, rank_agreement.describe(parameters, inputs)


def prepare_run(
    arguments: argparse.Namespace, parameters, group: DistributedContext, folder: Path
) -> tuple[TrainContext, dict[str, object]]:
    """(the run with its model and data, description of the data for the comparison of the ranks)."""
    model = load_model(arguments, parameters).to(group.device)
    train_split, validation_split = open_splits(arguments, parameters, model.config)
    run = TrainContext(
        stage=arguments.stage,
        model=model,
        train=train_split,
        validation=validation_split,
        seed=parameters.seed,
        common=parameters.training.common,
        settings=getattr(parameters.training, arguments.stage),
        streaming=parameters.streaming,
        runtime=parameters.runtime,
        folder=folder,
        distributed=group,
    )
    return run, rank_agreement.describe_data(run)


@contextmanager
def shared_scratch(group: DistributedContext, stage: str, fingerprint: str) -> Iterator[Path]:
    """Yields the scratch folder of the run, locked by the main process. With several machines it must be on a shared
    disk. While it waits for the lock, the other ranks hear from it, as a collective has a time limit."""
    if not group.is_main:
        while (folder := group.broadcast(None)) is None:
            pass
        yield folder
        return
    with locked_scratch(stage, fingerprint, each_minute=lambda: group.broadcast(None)) as (folder, _):
        yield group.broadcast(folder)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one stage.")
    parser.add_argument("--stage", choices=params.TRAINING_STAGES, required=True)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the stages' models")
    parser.add_argument("--metrics", type=Path, default=Path("outputs/metrics"))
    return parser.parse_args()


def start_folder(arguments: argparse.Namespace, parameters) -> Path:
    """What the stage starts from: the checkpoint of the previous stage; in the first one, `training.init_from`.

    UserError if `training.init_from` is a folder that this run writes.
    """
    number = params.TRAINING_STAGES.index(arguments.stage)
    if number:
        return arguments.outputs / params.TRAINING_STAGES[number - 1]
    start = Path(parameters.training.init_from)
    if start.resolve() in [(arguments.outputs / stage).resolve() for stage in params.TRAINING_STAGES]:
        raise UserError(
            f"training.init_from is {start}, a folder that this run itself writes. Copy the checkpoint to a folder "
            f"outside of {arguments.outputs} first, or write elsewhere with --outputs and --metrics."
        )
    return start


def is_checkpoint(start: Path) -> bool:
    """Whether the folder holds one trained model; else it holds the folders of two backbones."""
    return (start / "config.json").exists()


def check_tokenizer(start: Path, arguments: argparse.Namespace) -> None:
    """UserError if the data are tokenized with another tokenizer than the checkpoint's."""
    path = arguments.tokens / "manifest.json"
    expected = read_record(TokensManifest, path, "tokens").tokenizer_sha256
    found = tokenizer_sha256(start)
    if found != expected:
        raise UserError(
            f"{path}: tokenized with a tokenizer whose sha256 is {expected[:12]}, but that of {start} is {found[:12]}. "
            f"Take the backbones from the checkpoint, backbones.kind=local with {start} as local.vision_path and "
            "local.language_path, and run the stages backbones and tokens again."
        )


def input_files(arguments: argparse.Namespace, start: Path, settings) -> list[Path]:
    """The files whose content determines the result. The manifests contain the hashes of all shards."""
    if is_checkpoint(start) or arguments.stage != params.TRAINING_STAGES[0]:
        models = [start / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    else:
        folders = [start / name for name in ("vision_encoder", "language_model")]
        models = [folder / name for folder in folders for name in ("model.safetensors", "config.json")]
    files = [*models, arguments.shards / "manifest.json", arguments.tokens / "manifest.json"]
    files += objective_files(arguments.stage, settings)
    files += [heads_of(start)] if is_checkpoint(start) and settings.objective.initial_modules == "previous" else []
    for path in files:
        if not path.exists() and start in path.parents and arguments.stage == params.TRAINING_STAGES[0]:
            raise UserError(
                f"{path}: missing, but stage1 starts from it (training.init_from is {start}). Expected are the "
                "backbones (`dvc repro backbones`) or the folder of a finished checkpoint."
            )
        if not path.exists():
            raise UserError(
                f"{path}: missing, but {arguments.stage} starts from it. Run the previous stages with "
                f"`dvc repro {arguments.stage}`."
            )
    return files


def load_model(arguments: argparse.Namespace, parameters) -> FoveatedVLMForConditionalGeneration:
    """The model to train: built from the backbones, or loaded from a checkpoint.

    UserError if the checkpoint was made with other network options.
    """
    options = parameters.model.model_dump()
    start = start_folder(arguments, parameters)
    if not is_checkpoint(start):
        folders = (start / "vision_encoder", start / "language_model")
        try:
            return FoveatedVLMForConditionalGeneration.from_backbones(*folders, **options)
        except ValueError as error:
            raise UserError(f"{arguments.stage}: cannot build the network from section `model`: {error}") from None
    model = checkpoint.load_model(start)
    wrong = [
        f"model.{name} is {getattr(model.config, name)!r}, but params.yaml has {value!r}"
        for name, value in options.items()
        if value != "auto" and getattr(model.config, name) != value
    ]
    if wrong:
        next_step = "Rerun the previous stage."
        if arguments.stage == params.TRAINING_STAGES[0]:
            next_step = "Give section `model` the checkpoint's values, or set training.init_from to another folder."
        raise UserError(
            f"{start}: the checkpoint does not match the parameters of {arguments.stage} ({'; '.join(wrong)}). "
            f"{next_step}"
        )
    return model


def heads_of(folder: Path) -> Path:
    """The file with the weights of the objectives' own modules, in a stage's checkpoint folder."""
    return folder / "objective.safetensors"


def load_heads(before: Path, run: TrainContext) -> None:
    """Loads the weights of the objectives' own modules in the checkpoint folder `before` if `initial_modules` is
    `previous`.

    UserError if it is no checkpoint, or there is no such module, or a module of another name or shape.
    """
    heads = run.training_model.objective
    key = f"training.{run.stage}.objective.initial_modules"
    if run.settings.objective.initial_modules == "new":
        return
    if not len(heads) or not is_checkpoint(before):
        reason = "no objective of this stage has modules" if is_checkpoint(before) else "there is no previous stage"
        raise UserError(f"{key} is previous, but {reason}. Set it to new.")
    found, own = load_file(heads_of(before)), heads.state_dict()
    shapes = {name: list(value.shape) for name, value in own.items()}
    if shapes != {name: list(value.shape) for name, value in found.items()}:
        raise UserError(
            f"{heads_of(before)}: contains {', '.join(sorted(found))}, but {run.stage} needs {', '.join(sorted(own))} "
            f"with the shapes {shapes}. Set {key} to new, or give both stages the same objectives."
        )
    heads.load_state_dict(found)


def open_splits(arguments: argparse.Namespace, parameters, config) -> tuple[TokenizedShards, TokenizedShards]:
    """(training split, local or remote; local validation split). UserError if their frames were packed differently."""
    streaming = parameters.streaming
    train_split = open_training_split(config, streaming, parameters.runtime, arguments.shards, arguments.tokens)
    validation_split = TokenizedShards.for_model(
        config, arguments.shards, arguments.tokens, "validation", streaming.image_replication
    )
    if train_split.frame_policy != validation_split.frame_policy:
        raise UserError(
            f"{streaming.url}: frames packed with {train_split.frame_policy}, but those in {arguments.shards} with "
            f"{validation_split.frame_policy}. Pack both with the same section `shards`."
        )
    return train_split, validation_split


def format_unmatched(unmatched: dict[str, int]) -> list[str]:
    """[one line] about items that match no mixture entry, or []. unmatched: {source/task: number of items}."""
    listing = ", ".join(f"{name} {count:,}" for name, count in unmatched.items())
    return [f"  items that match no mixture entry: {listing}"] if unmatched else []


def trained_sources(run: TrainContext, start: Path) -> dict[str, int]:
    """{source: samples trained on}, of this stage and, where it is recorded, of all before (training.json)."""
    index, order = run.train.index, run.stage_plan.plan.order
    counts = np.bincount(index.source[order], minlength=len(index.sources)).tolist()
    found = Counter(dict(zip(index.sources, counts, strict=True)))
    if (start / "training.json").exists():
        found += Counter(json.loads((start / "training.json").read_text()).get("sources", {}))
    return {name: count for name, count in sorted(found.items()) if count}


def publish(arguments: argparse.Namespace, start: Path, run: TrainContext, result: dict, seconds: float) -> None:
    """Writes the finished checkpoint, its curves and its timing, each file or folder atomically.

    The timing has a file of its own because it differs between runs of the same work.
    """
    with replaced_folder(arguments.outputs / arguments.stage) as folder:
        shards = read_record(ShardsManifest, arguments.shards / "manifest.json", "shards")
        tokens = read_record(TokensManifest, arguments.tokens / "manifest.json", "tokens")
        checkpoint.save_checkpoint(
            folder,
            run.published,
            start if is_checkpoint(start) else start / "language_model",
            **shards.frames.model_dump(),
            image_replication=run.streaming.image_replication,
            system=tokens.system,
        )
        if run.published_heads:
            save_file(run.published_heads, heads_of(folder), {"objective": run.settings.objective.model_dump_json()})
        (folder / "training.json").write_text(
            json.dumps({"stage": arguments.stage, **result}, indent=1, sort_keys=True) + "\n"
        )
        base = start / BASE_MODELS if is_checkpoint(start) else arguments.metrics / "backbones.json"
        base_models = model_card.base_models(base)
        write_json(folder / BASE_MODELS, base_models)
        write_checksums(folder)  # not of the card, which people edit
        card = model_card.model_card(
            arguments.stage,
            run.published,
            result,
            shards,
            tokens,
            run.settings.num_samples,
            base_models,
        )
        model_card.write(folder, card)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in run.history
    )
    write_text(arguments.metrics / f"{arguments.stage}.csv", table.getvalue())
    summary = {
        "validation": by_task(result["validation"]),
        "best": result["best"],
        "mixture": result["mixture"],
        "unmatched": result["unmatched"],
        "quarantined": result["quarantined"],
        "parameters": result["parameters"],
        "num_steps": run.num_steps,
    }
    write_json(arguments.metrics / f"{arguments.stage}.json", summary)
    timing = {
        "seconds": round(seconds, 1),
        "samples_per_second": round(run.logger.samples / seconds, 1),  # since this process started or resumed
        "device": run.device,
    }
    if run.train.sequential:
        timing["remote"] = run.train.transfers.summary()  # of this rank
    write_json(arguments.outputs / "timings" / f"{arguments.stage}.json", timing)


def by_task(rows: list[dict]) -> dict[str, dict]:
    """{task: {mode: {"loss", "accuracy"}}} from validation rows: token-weighted means over the sources."""
    tasks: dict[str, dict] = {}
    for row in rows:
        if row["event"] == "validation":
            tasks.setdefault(row["task"], {}).setdefault(row["mode"], []).append(row)
    return {
        task: {mode: {name: _token_mean(same, name) for name in ("loss", "accuracy")} for mode, same in modes.items()}
        for task, modes in tasks.items()
    }


def _token_mean(rows: list[dict], name: str) -> float:
    if len(rows) == 1:
        return round(rows[0][name], 6)
    return round(sum(row[name] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows), 6)


if __name__ == "__main__":
    run_main(main)
