"""Parameters of section `runtime` of params.yaml: how the stages are executed and monitored.

No result depends on them. So dvc.yaml lists them for no stage, and a changed value neither reruns a stage nor discards
the checkpoint of an interrupted run.
"""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    num_workers: NonNegativeInt
    """Data loader threads; 0: the main thread."""
    prefetch_megabytes: PositiveInt
    """Memory limit of prefetched batches."""
    retries: NonNegativeInt
    """Retries after a broken connection (reader `webdataset`)."""
    backbone_workers: PositiveInt
    """Processes that render warm-up frames."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt
    """Checkpoints to keep."""
    log_every: PositiveInt
    """Steps between updates of progress bar and live curves."""
    tensorboard: bool
    """Log curves in outputs/live/STAGE."""
    dvclive: bool
    """Log curves in outputs/live/STAGE."""
    wandb_project: str | None
    """Weights & Biases project; needs a login."""
    heatmaps_every: PositiveInt | None
    """Steps between attention overlays; null: none."""
    num_heatmap_clips: PositiveInt
    """Clips to overlay."""
    peak_tflops: PositiveFloat | None
    """Device peak for MFU; null: published bf16 figure."""
    warn_above_epochs: PositiveFloat
    """Epochs of a mixture group before a warning."""
