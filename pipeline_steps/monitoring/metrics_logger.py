"""Live monitoring of training: progress bar, TensorBoard, DVCLive and Weights & Biases curves, attention overlays.

Results do not depend on this module.
"""

import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.monitoring.mfu import peak_flops
from pipeline_steps.monitoring.progress import progress_bar

SIDE = 112  # px of a picture


class MetricsLogger:
    """The loggers of one run, active in the main process only. `close()` flushes and closes them."""

    def __init__(self, settings, stage: str, num_steps: int, folder: Path, group, precision: str):
        """folder: for all output. group: the DistributedContext of the run."""
        self.settings, self.stage, self.num_steps, self.folder = settings, stage, num_steps, folder
        self.device, self.is_main = group.device, group.is_main
        self.peak = peak_flops(settings.peak_tflops, group.device, precision)
        self.bar = None
        self.started, self.samples, self.positions, self.flops = time.monotonic(), 0, 0, 0.0
        self.loggers = start_loggers(settings, stage, folder) if group.is_main else []

    def progress(self, batches: Iterable, first: int) -> Iterator:
        """Yields the batches and shows a progress bar."""
        self.started = time.monotonic()
        options = {"total": self.num_steps, "initial": first, "disable": not self.is_main}
        with progress_bar(self.stage, batches, unit="step", **options) as self.bar:
            yield from self.bar

    def step(self, row: dict, is_logged: bool, num_samples: int, num_positions: int, flops: float) -> None:
        """Call after every step. row: its row of the metrics table. is_logged: whether to log the row. num_samples,
        num_positions: of the step, summed over the ranks. flops: of this rank (0 if the peak is unknown)."""
        self.samples += num_samples
        self.positions += num_positions
        self.flops += flops
        if not (self.is_main and is_logged):
            return
        speed = self.speed()
        self.bar.set_postfix_str(bar_text(row, speed))
        self._log(row["step"], {f"train/{name}": row[name] for name in row if name not in ("event", "step")} | speed)

    def speed(self) -> dict[str, float]:
        """Throughput since this process started, peak memory so far and, if the device's peak is known, the MFU."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        values = {
            "speed/samples_per_second": self.samples / seconds,
            "speed/tokens_per_second": self.positions / seconds,
            "speed/peak_memory_gib": peak_memory(self.device),
        }
        if self.peak:
            values["speed/mfu"] = self.flops / seconds / self.peak
        return values

    def rows(self, rows: list[dict]) -> None:
        """Logs the rows of one validation."""
        for row in rows:
            place = "/".join(str(row[name]) for name in ("event", "source", "task", "mode") if name in row)
            numbers = {name: value for name, value in row.items() if isinstance(value, float)}
            self._log(row["step"], {f"{place}/{name}": value for name, value in numbers.items()})

    def pictures(self, step: int, items: list[dict], weights: np.ndarray) -> None:
        """Attention overlays: one strip per clip, the frames above and their overlays below.

        weights [F, N]: attention over the patches, for the frames of all clips; each row sums to 1.
        """
        if not self.is_main:
            return
        target = self.folder / "attention"
        target.mkdir(parents=True, exist_ok=True)
        first = 0
        for item in items:
            frames = item["frames"]
            strip = attention_strip(frames, weights[first : first + len(frames)])
            first += len(frames)
            strip.save(target / f"{item['key']}-{item['item']}-{step:08d}.png")
            for logger in self.loggers:
                logger.picture(f"attention/{item['key']}", strip, step)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def _log(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.scalars(values, step)


def bar_text(row: dict, speed: dict[str, float]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if row.get("loss_coarse"):
        parts.append(f"fine/coarse {row['loss'] / row['loss_coarse']:.2f}")
    parts.append(f"{speed['speed/samples_per_second']:.0f} samples/s")
    parts.append(f"{speed['speed/tokens_per_second']:.0f} tokens/s")
    if "speed/mfu" in speed:
        parts.append(f"MFU {speed['speed/mfu']:.1%}")
    return ", ".join(parts)


def peak_memory(device: str) -> float:
    """Peak memory in GiB, of the GPU or else of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def attention_strip(frames: np.ndarray, maps: np.ndarray) -> Image.Image:
    """frames uint8 [T, H, W, 3], maps [T, N]: a row of frames above the same frames weighted by attention."""
    grid = round(maps.shape[-1] ** 0.5)
    strip = Image.new("RGB", (SIDE * len(frames), SIDE * 2))
    for number, (frame, weights) in enumerate(zip(frames, maps, strict=True)):
        picture = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        light = Image.fromarray((255 * weights / weights.max()).astype(np.uint8).reshape(grid, grid))
        light = light.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        strip.paste(picture, (number * SIDE, 0))
        strip.paste(picture, (number * SIDE, SIDE), light.point(lambda value: 40 + value * 215 // 255))
    return strip


# ---------------------------------------------------------------- loggers


def start_loggers(settings, stage: str, folder: Path) -> list:
    """The enabled loggers whose packages are installed, with a note on stderr for each missing package. UserError if
    W&B is enabled but not installed."""
    loggers = []
    for wanted, package, make in (
        (settings.tensorboard, "tensorboard", TensorBoard),
        (settings.dvclive, "dvclive", DVCLive),
    ):
        if wanted and find_spec(package) is None:
            print(f"note: {package} is not installed, so there are no curves in {folder / package}.", file=sys.stderr)
        elif wanted:
            loggers.append(make(folder / package))
    if settings.wandb_project:
        if find_spec("wandb") is None:
            raise UserError(
                "runtime.wandb_project is set, but wandb is not installed. Run `pip install -e '.[wandb]'`, or set it "
                "to null."
            )
        loggers.append(WeightsAndBiases(settings.wandb_project, stage, folder))
    return loggers


class TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class DVCLive:
    def __init__(self, folder: Path):
        from dvclive import Live

        drop_if_cut_off(folder / "metrics.json")
        self.live = Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None, resume=True)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.live.make_summary()

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.live.log_image(f"{name}.png", picture)

    def close(self) -> None:
        self.live.end()


def drop_if_cut_off(summary: Path) -> None:
    """Deletes DVCLive's file of the latest values if a killed run left it truncated. DVCLive would raise a
    JSONDecodeError; without the file it writes a new one."""
    try:
        json.loads(summary.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        summary.unlink()


def known_id(path: Path) -> str:
    """The id of the W&B run in a file, or a new one (wandb has moved its own function between versions)."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # new, or cut off by a kill
        return secrets.token_hex(4)


class WeightsAndBiases:
    def __init__(self, project: str, stage: str, folder: Path):
        import wandb

        self.wandb = wandb
        identity = folder / "wandb.json"  # a resumed run continues the same curve
        known = known_id(identity)
        self.run = wandb.init(project=project, name=stage, id=known, resume="allow", dir=str(folder))
        identity.write_text(json.dumps({"id": known}))

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()
