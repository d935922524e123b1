"""Speed and memory of the network as ratios to the predecessor's algorithm (benchmarks/original.py) in the same run.

    python -m benchmarks.speed                                     the embedded scale on the CPU
    python -m benchmarks.speed --size 135M --device cuda --output 135M.json
    python -m benchmarks.speed --only train --samples 8 --rounds 9

Both sides use the same random weights, batches and precision (bf16 is autocast in training and the weights' type in
inference) and, in training, the same step around the forward pass: frames from page-locked memory, backward pass,
gradient clipping, fused AdamW, the loss and the norm read. They run alternately, so other load on the machine affects
both alike. Times are medians over the rounds; a ratio is the median of the rounds' ratios, reference over network: 2 is
twice as fast. On a CPU the ratio of processor times is beside that of wall times; other load hardly affects it. Memory
is the peak of one call with the weights and the optimizer's state; its ratio is network over reference: .5 is half.

    train          one optimizer step on a mixture of samples of 1 to 64 frames, as one micro-batch and as four
    modes          a forward pass with loss, per mode, number of samples (1, 8) and frames (1, 8, 64)
    first_token    from frames and question to the first answer token, one sample
    compiled       train, the network compiled (`compile_hot_paths`), the reference not (on request)

Cost: 2 minutes on one core at the embedded scale, 1 GB of memory.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from benchmarks.modes import peak_bytes
from benchmarks.original import Original, PaddedBatch, pad
from benchmarks.workload import SCALES, clips, mixture, network_config, read_scale
from model import FoveatedVLMForConditionalGeneration, FoveationOptions
from model.constants import MODES
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_json
from pipeline_steps.monitoring.mfu import StepFlops, peak_flops
from pipeline_steps.streaming.batch import Batch

PARTS = ("train", "modes", "first_token", "compiled")
FRAMES, SAMPLES = (1, 8, 64), (1, 8)
MICRO_BATCHES = (1, 4)  # of a step
MIN_ROUNDS = 2
LEARNING_RATE = 1e-5
MIB = 2**20


class Clock:
    """How much of a time limit (seconds; None: no limit) is left."""

    def __init__(self, limit: float | None):
        self.end = None if limit is None else time.monotonic() + limit

    @property
    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end


class Bench:
    """The two sides of one size on one device."""

    def __init__(self, size: str, device: str, rounds: int, seconds: float, clock: Clock):
        """rounds: at most, per figure. seconds: no further round of a figure begins after so many."""
        self.device, self.rounds, self.seconds, self.clock = device, rounds, seconds, clock
        self.config = network_config(size)
        self.precision = read_scale(size)["training"]["common"]["precision"]
        torch.manual_seed(0)
        with torch.device(device):
            self.network = FoveatedVLMForConditionalGeneration(self.config)
        self.original = Original(self.network)

    @cached_property
    def cast(self) -> tuple[FoveatedVLMForConditionalGeneration, Original]:
        """(network, original) with a copy of the weights in the precision of inference, which needs no autocast."""
        network = copy.deepcopy(self.network).eval()
        network = network.to(torch.bfloat16) if self.precision == "bf16" else network
        return network, Original(network)

    def autocast(self):
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def compare(self, original: Callable, network: Callable, count: int, resident: int) -> dict:
        """Times, rates (`count` per call) and peak memory of two calls. resident: bytes that stay allocated."""
        sides = {"original": original, "network": network}
        peaks = {name: resident + peak_bytes(run, self.device) for name, run in sides.items()}  # warms up, too
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}  # wall, processor
        started = time.monotonic()
        while len(times["network"]) < self.rounds:
            order = list(sides) if len(times["network"]) % 2 else list(sides)[::-1]
            for name in order:
                times[name].append(self._seconds(sides[name]))
            enough = time.monotonic() - started > self.seconds or self.clock.is_over
            if enough and len(times["network"]) >= MIN_ROUNDS:
                break
        wall, processor = ({name: [pair[at] for pair in own] for name, own in times.items()} for at in (0, 1))
        ratios = [a / b for a, b in zip(wall["original"], wall["network"], strict=True)]
        medians = {name: statistics.median(values) for name, values in wall.items()}
        result = {
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "rounds": len(ratios),
            "seconds": medians,
            "per_second": {name: count / value for name, value in medians.items()},
            "peak_bytes": peaks,
            "memory_ratio": peaks["network"] / peaks["original"],
        }
        if self.device == "cpu":
            pairs = zip(processor["original"], processor["network"], strict=True)
            result["processor_ratio"] = statistics.median(a / b for a, b in pairs)
            result["processor_seconds"] = {name: statistics.median(values) for name, values in processor.items()}
        return result

    def _seconds(self, run: Callable) -> tuple[float, float]:
        """Wall and processor time of a call."""
        self.synchronize()
        started = time.perf_counter(), time.process_time()
        run()
        self.synchronize()
        return time.perf_counter() - started[0], time.process_time() - started[1]

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def host(self, batch: Batch | PaddedBatch) -> Batch | PaddedBatch:
        """The batch in page-locked memory where there is a GPU, from which copies need not be waited for."""
        return batch if self.device == "cpu" else batch.pin_memory()

    # ---- figures: {name: function that measures it}

    def figures(self, parts: tuple[str, ...], num_samples: int) -> Iterator[tuple[str, str, Callable[[], dict]]]:
        """(part, name, function) of everything that `parts` name."""
        for part in ("train", "compiled"):
            if part == "compiled":
                yield from self._inference(parts)
            if part in parts:
                for micro_batches in MICRO_BATCHES:
                    size = -(-num_samples // micro_batches)
                    yield part, f"{size} x {micro_batches}", partial(self.train, num_samples, size, part == "compiled")

    def _inference(self, parts: tuple[str, ...]) -> Iterator[tuple[str, str, Callable[[], dict]]]:
        if "modes" in parts:
            for count in SAMPLES:
                for frames in FRAMES:
                    for mode in MODES:
                        yield "modes", f"{mode} B={count} T={frames}", partial(self.mode, mode, count, frames)
        if "first_token" in parts:
            for frames in FRAMES[1:]:
                yield "first_token", f"T={frames}", partial(self.first_token, frames)

    def train(self, num_samples: int, size: int, is_compiled: bool = False) -> dict:
        """An optimizer step on `num_samples` samples in micro-batches of `size`."""
        self.network.train()
        batch = mixture(self.config, num_samples)
        pieces = {"network": list(batch.split(size))}
        pieces["original"] = [pad(self.config, **piece.inputs(), labels=piece.labels) for piece in pieces["network"]]
        pieces = {name: [self.host(piece) for piece in own] for name, own in pieces.items()}
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, fused=True)
        forwards = {"original": self._original_loss, "network": self._network_loss}
        steps = {name: partial(self._step, optimizer, pieces[name], forwards[name]) for name in forwards}
        if is_compiled:
            self.network.compile_hot_paths()
            steps["original"] = _without_compilation(steps["original"])
        for step in steps.values():
            step()  # makes the optimizer's state, and graphs
        state = sum(v.nbytes for own in optimizer.state.values() for v in own.values() if torch.is_tensor(v))
        result = self.compare(steps["original"], steps["network"], num_samples, weights_of(self.network) + state)
        side = self.config.vision_config.image_size
        result["flops"] = StepFlops(self.network, side).of_batch(batch, self.config.num_passes)
        peak = peak_flops(None, self.device, self.precision)
        if peak is not None:
            result["mfu"] = {name: result["flops"] / value / peak for name, value in result["seconds"].items()}
        return result | {"num_frames": int(batch.num_frames.sum())}

    def _step(self, optimizer: torch.optim.Optimizer, pieces: list, forward: Callable) -> tuple[float, float]:
        """Loss and gradient norm of an optimizer step."""
        total = 0.0
        for piece in pieces:
            with self.autocast():
                loss = forward(piece.to(self.device)) / len(pieces)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _original_loss(self, piece: PaddedBatch) -> Tensor:
        return self.original(piece, num_plans=self.config.num_passes).loss

    def _network_loss(self, piece: Batch) -> Tensor:
        text = self.network.packed_text(piece.input_ids, piece.attention_mask, places=piece.places)
        options = FoveationOptions(num_plans=self.config.num_passes, text=text, return_logits=False, loss_only=True)
        return self.network(**piece.inputs(), labels=piece.labels, options=options).loss

    def mode(self, mode: str, num_samples: int, num_frames: int) -> dict:
        """A forward pass with loss; rates are frames per second."""
        batch, padded = self._clips(num_samples, num_frames)
        network, original = self.cast

        @torch.no_grad()
        def run(side: str) -> Tensor:
            if side == "original":
                return original(padded, mode).loss
            options = FoveationOptions(return_logits=False)
            return network(**batch.inputs(), labels=batch.labels, mode=mode, options=options).loss

        count = num_samples * num_frames
        return self.compare(partial(run, "original"), partial(run, "network"), count, weights_of(network))

    def first_token(self, num_frames: int) -> dict:
        """The first token of the answer to one sample, autoregressive."""
        batch, padded = self._clips(1, num_frames)
        network, original = self.cast

        @torch.no_grad()
        def run(side: str) -> Tensor:
            if side == "original":
                return original.first_token(padded)
            return network.generate(**batch.inputs(), max_new_tokens=1, do_sample=False)

        return self.compare(partial(run, "original"), partial(run, "network"), 1, weights_of(network))

    def _clips(self, num_samples: int, num_frames: int) -> tuple[Batch, PaddedBatch]:
        """The same clips for both sides, on the device."""
        batch = clips(self.config, num_samples, num_frames)
        padded = pad(self.config, **batch.inputs(), labels=batch.labels)
        return batch.to(self.device), padded.to(self.device)


def weights_of(network: nn.Module) -> int:
    """Bytes of the weights."""
    return sum(tensor.nbytes for tensor in network.state_dict(keep_vars=True).values())


def _without_compilation(run: Callable) -> Callable:
    def eager():
        with torch.compiler.set_stance("force_eager"):
            return run()

    return eager


def measure(bench: Bench, parts: tuple[str, ...], num_samples: int, save: Callable[[dict], None]) -> dict:
    """{part: {name: figure}}. `save` gets all figures so far after every one. A figure that the device has no memory
    for, or no time is left for, is a text that says so."""
    found: dict[str, dict] = {}
    for part, name, figure in bench.figures(parts, num_samples):
        own = found.setdefault(part, {})
        if bench.clock.is_over:
            own[name] = "not measured: the time limit was reached"
            continue
        try:
            own[name] = figure()
        except torch.OutOfMemoryError as error:
            own[name] = f"not measured: out of memory ({str(error).splitlines()[0]})"
        bench.network.zero_grad(set_to_none=True)
        if bench.device != "cpu":
            torch.cuda.empty_cache()
        save(found)
    return found


def table(size: str, found: dict[str, dict]) -> str:
    """The figures of one size, one a line."""
    head = f"{'original':>12}{'network':>12}{'ratio':>8}{'range':>14}{'processor':>10}{'memory':>14}{'ratio':>7}"
    lines = [f"{size:<34}{head}"]
    for part, figures in found.items():
        for name, figure in figures.items():
            if isinstance(figure, str):
                lines.append(f"{part:<12}{name:<22}  {figure}")
                continue
            milliseconds = "".join(f"{figure['seconds'][side] * 1e3:>9.1f} ms" for side in ("original", "network"))
            spread = "{:.2f}-{:.2f}".format(*figure["ratio_range"])
            memory = f"{figure['peak_bytes']['network'] / MIB:>10,.0f} MiB{figure['memory_ratio']:>7.2f}"
            mfu = f"  MFU {figure['mfu']['network']:.1%}" if "mfu" in figure else ""
            processor = f"{figure['processor_ratio']:>10.2f}" if "processor_ratio" in figure else f"{'':>10}"
            line = f"{part:<12}{name:<22}{milliseconds}{figure['ratio']:>8.2f}{spread:>14}{processor}{memory}{mfu}"
            lines.append(line)
    return "\n".join(lines)


def about(device: str) -> dict:
    """What the figures were measured on and with."""
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
    }


def cpu_name() -> str:
    """The processor's name and number of cores, as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> dict:
    """The commit of the code and whether tracked files differ from it; None where there is no repository or no git."""
    folder = Path(__file__).resolve().parent
    try:
        calls = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        texts = [subprocess.run(["git", *call], cwd=folder, capture_output=True, text=True) for call in calls]
    except FileNotFoundError:
        return {"commit": None, "dirty": None}
    if any(done.returncode for done in texts):
        return {"commit": None, "dirty": None}
    return {"commit": texts[0].stdout.strip(), "dirty": bool(texts[1].stdout.strip())}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory as ratios to the predecessor's algorithm.")
    parser.add_argument("--size", choices=tuple(SCALES), default="tiny")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:3], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--samples", type=int, default=32, help="of a training step")
    parser.add_argument("--rounds", type=int, default=15, help="at most, per figure")
    parser.add_argument("--seconds", type=float, default=3.0, help="per figure; no further round begins after so many")
    parser.add_argument("--limit", type=float, help="seconds after which no further figure begins")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file, one by one")
    arguments = parser.parse_args()
    if arguments.samples % max(MICRO_BATCHES):
        raise UserError(
            f"--samples is {arguments.samples}, expected a multiple of {max(MICRO_BATCHES)}: a step has up to so many "
            "micro-batches."
        )
    for name in ("samples", "rounds", "num_threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected 1 or more.")
    return arguments


def main() -> None:
    arguments = read_arguments()
    device = choose_device(arguments.device, "--device")
    if arguments.output:
        check_outputs(files=[arguments.output])
    torch.set_num_threads(arguments.num_threads)
    bench = Bench(arguments.size, device, arguments.rounds, arguments.seconds, Clock(arguments.limit))
    made = {
        **about(device),
        "size": arguments.size,
        "num_parameters": bench.network.num_parameters(),
        "precision": bench.precision,
    }

    def save(found: dict) -> None:
        if arguments.output:
            write_json(arguments.output, {**made, "figures": found})

    found = measure(bench, tuple(arguments.only), arguments.samples, save)
    save(found)
    print(table(arguments.size, found))


if __name__ == "__main__":
    run_main(main)
