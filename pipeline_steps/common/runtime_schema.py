"""Parameters of section `runtime` of params.yaml: how the stages are executed and monitored.

No result depends on them. So dvc.yaml lists them for no stage, and a changed value neither reruns a stage nor discards
the checkpoint of an interrupted run.
"""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    num_workers: NonNegativeInt
    """Threads that read, decode and collate batches; 0: in the main thread."""
    prefetch_megabytes: PositiveInt
    """Memory limit of prepared batches."""
    retries: NonNegativeInt
    """Retries after a broken connection (`streaming.reader: webdataset`)."""
    backbone_workers: PositiveInt
    """Processes that render frames for the warm-up of embedded backbones."""
    checkpoint_every: PositiveInt
    """Training steps between checkpoints."""
    keep_checkpoints: PositiveInt
    """Latest checkpoints to keep."""
    log_every: PositiveInt
    """Training steps between updates of the progress bar's figures and of the live curves."""
    tensorboard: bool
    """Write curves to outputs/live/<stage>/tensorboard."""
    dvclive: bool
    """Write curves to outputs/live/<stage>/dvclive."""
    wandb_project: str | None
    """Weights & Biases project (installed and logged in); null: none."""
    heatmaps_every: PositiveInt | None
    """Training steps between attention overlays of fixed validation clips; null: none."""
    num_heatmap_clips: PositiveInt
    """Number of those clips."""
    peak_tflops: PositiveFloat | None
    """Peak of one device for the MFU; null: the published bf16 figure of a known GPU, else no MFU."""
    warn_above_epochs: PositiveFloat
    """Warn before the first step if a mixture group repeats more often than this."""
