"""Print and write what the training stages will read, without running them.

    python -m pipeline_steps.streaming --stats                     each stage's own number of samples
    python -m pipeline_steps.streaming --stats --num-samples 100000

Prints a table per stage: samples, share, epochs, frames and tokens of every source and task, truncated chats, and
items that no mixture entry matches. Writes outputs/metrics/streaming.json (docs/metrics.md) unless --num-samples is
given. Reads only the sidecars' columns of lengths, so it takes seconds for any amount of data.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from model import FoveatedVLMConfig
from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import printable, run_main
from pipeline_steps.common.files import check_outputs
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.streaming.loader import plan_stage
from pipeline_steps.streaming.statistics import count, table

PARAMS = (
    "seed",
    "model.architecture",
    "model.num_visual_tokens_per_frame",
    "model.token_aggregation",
    "streaming.batching",
    "streaming.image_replication",
    "training.common.batch_size",
    "training.stage1.mixture",
    "training.stage1.num_samples",
    "training.stage1.text_share",
    "training.stage1.text_source",
    "training.stage2.mixture",
    "training.stage2.num_samples",
    "training.stage2.text_share",
    "training.stage2.text_source",
    "training.stage3.mixture",
    "training.stage3.num_samples",
    "training.stage3.text_share",
    "training.stage3.text_source",
)


def main() -> None:
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    if arguments.num_samples is None:
        check_outputs(files=[arguments.metrics / "streaming.json"])
    dataset = TokenizedShards(arguments.shards, arguments.tokens, "train", with_frames=False)
    result = metrics.StreamingResult(
        stages={
            stage: count_stage(dataset, parameters, stage, arguments.num_samples) for stage in params.TRAINING_STAGES
        }
    )
    print(printable("\n\n".join(table(stage, counts) for stage, counts in result.stages.items())))
    if arguments.num_samples is None:
        metrics.write_json(arguments.metrics / "streaming.json", result)


def count_stage(dataset: TokenizedShards, parameters, stage: str, num_samples: int | None) -> metrics.StageCounts:
    """Count what one stage reads. Raises UserError if the data lack items that its mixture asks for."""
    settings = getattr(parameters.training, stage)
    options = {name: getattr(settings, name) for name in ("mixture", "text_share", "text_source")}
    sizes = {"tokens_per_frame": FoveatedVLMConfig(**parameters.model.as_dict()).tokens_per_frame}
    plan = plan_stage(
        dataset,
        SimpleNamespace(**options, num_samples=num_samples or settings.num_samples),
        parameters.streaming,
        stage=stage,
        seed=parameters.seed,
        batch_size=parameters.training.common.batch_size,
        **sizes,
    )
    return count(dataset, plan, image_replication=parameters.streaming.image_replication, **sizes)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count what the training stages would read.")
    parser.add_argument(
        "--stats", action="store_true", required=True, help="count what each stage reads (the only mode)"
    )
    parser.add_argument("--num-samples", type=positive, help="samples per stage (default: as in the parameters)")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--metrics", type=Path, default=Path("outputs/metrics"))
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {number}, expected a positive number of samples")
    return number


if __name__ == "__main__":
    run_main(main)
