"""Parameters of section `runtime` of params.yaml: how the stages are executed and monitored.

No result depends on them. So dvc.yaml lists them for no stage, and a changed value neither reruns a stage nor discards
the checkpoint of an interrupted run.
"""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    num_workers: NonNegativeInt
    """Loader threads; 0: the main thread."""
    prefetch_megabytes: PositiveInt
    """Limit of prefetched batches."""
    retries: NonNegativeInt
    """Retries of a broken connection."""
    backbone_workers: PositiveInt
    """Processes that render warm-up frames."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt
    """Checkpoints to keep."""
    log_every: PositiveInt
    """Steps between live updates."""
    tensorboard: bool
    """Curves in outputs/live/STAGE."""
    dvclive: bool
    """Curves in outputs/live/STAGE."""
    wandb_project: str | None
    """Weights & Biases project; needs a login."""
    heatmaps_every: PositiveInt | None
    """Steps between attention overlays."""
    num_heatmap_clips: PositiveInt
    """Clips to overlay."""
    peak_tflops: PositiveFloat | None
    """Device peak for MFU; null: published bf16 figure."""
    warn_above_epochs: PositiveFloat
    """Epochs of a mixture group before a warning."""
