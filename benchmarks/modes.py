"""Time and peak memory of the three modes over the number of frames, and their scaling exponents.

    python -m benchmarks.modes
    python -m benchmarks.modes --fovea 4 4
    python -m benchmarks.modes --config outputs/stage3 --image-size 56 --output outputs/metrics/benchmark_modes.json

One sample with T frames between 32 and 16 text tokens goes through a forward pass in evaluation mode, in fp32. The
weights are random, which changes neither time nor memory. Without `--config` the network's size is between the embedded
scale and DINOv2-small with SmolLM2-135M, large enough that arithmetic dominates Python overhead. Time is the fastest of
`--repeats` runs; memory is the peak that a run allocates in addition to weights and inputs. An exponent is the slope in
log-log space for T >= 8 (below, text dominates): 1 is linear; a fixed cost lowers the exponent.
`--fovea R S` compares, in the same run, the network with one that encodes frames reduced by R and a window of S x S
patches (`frame_downsampling`, `fovea_size`): wall-clock per frame and vision FLOPs, full over fovea.
Cost: 1 to 2 minutes on one core, below 1 GB of memory.
"""

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs every start and stop

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from model.constants import IGNORE_INDEX, MODES
from pipeline_steps.common import flop_formulas
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_json

FRAMES = (1, 2, 4, 8, 16, 32, 64)
FIT_FROM = 8  # frames
TEXT_BEFORE, TEXT_AFTER = 32, 16  # tokens
MIB = 2**20


def default_config() -> FoveatedVLMConfig:
    vision = Dinov2Config(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, image_size=112, patch_size=14)
    text = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return FoveatedVLMConfig(vision, text, query_dim=192, visual_scale=0.1, visual_token_id=8192)


def make_sample(config: FoveatedVLMConfig, num_frames: int, image_size: int, device: str) -> dict:
    """Arguments of `forward` for one sample: input_ids [1, S], pixel_values [T, 3, image_size, image_size]."""
    visual = [config.visual_token_id] * (num_frames * config.tokens_per_frame)
    ids = torch.tensor([[5] * TEXT_BEFORE + visual + [7] * TEXT_AFTER], device=device)
    pixels = torch.randn(num_frames, 3, image_size, image_size, device=device)
    labels = torch.where(ids == 7, ids, IGNORE_INDEX)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "num_frames": torch.tensor([num_frames], device=device),
        "labels": labels,
    }


def seconds(run, device: str, repeats: int) -> float:
    """Wall time of the fastest of `repeats` runs, after one warm-up run."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def peak_bytes(run, device: str) -> int:
    """Peak memory that a run allocates, in addition to what was allocated before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak


def exponent(frames: tuple[int, ...], values: list[float]) -> float | None:
    """Slope of log(value) over log(frames) from FIT_FROM frames on, least squares; None with fewer than two points."""
    points = [(math.log(t), math.log(v)) for t, v in zip(frames, values, strict=True) if t >= FIT_FROM]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure(
    config: FoveatedVLMConfig, frames: tuple[int, ...], image_size: int, device: str, repeats: int
) -> dict[str, dict]:
    """Per mode: seconds and peak bytes of every number of frames, and the two exponents."""
    torch.manual_seed(0)
    model = FoveatedVLMForConditionalGeneration(config).to(device).eval()
    samples = [make_sample(config, count, image_size, device) for count in frames]
    result, options = {}, {"return_logits": False}
    with torch.no_grad():
        for mode in MODES:
            runs = [lambda sample=sample, mode=mode: model(**sample, mode=mode, options=options) for sample in samples]
            times = [seconds(run, device, repeats) for run in runs]
            peaks = [peak_bytes(run, device) for run in runs]
            result[mode] = {
                "seconds": times,
                "peak_bytes": peaks,
                "time_exponent": exponent(frames, times),
                "memory_exponent": exponent(frames, peaks),
            }
    return result


def compare_fovea(
    config: FoveatedVLMConfig, factor: int, size: int, frames: int, image_size: int, device: str, repeats: int
) -> dict[str, dict]:
    """Per mode but coarse: milliseconds per frame and vision FLOPs (encoder and queries) per frame of the network as
    it is and with a fovea, and their ratios (full over fovea; of the times the median over rounds of both in turn)."""
    fovea = copy.deepcopy(config)
    fovea.frame_downsampling, fovea.fovea_size = factor, size
    networks = {}
    for name, own in (("full", config), ("fovea", fovea)):
        torch.manual_seed(0)
        networks[name] = FoveatedVLMForConditionalGeneration(own).to(device).eval()
    sample = make_sample(config, frames, image_size, device)
    result = {}
    with torch.no_grad():
        for mode in MODES[1:]:
            times: dict[str, list[float]] = {name: [] for name in networks}
            for _ in range(repeats):
                for name, network in networks.items():
                    run = lambda network=network, mode=mode: network(  # noqa: E731
                        **sample, mode=mode, options={"return_logits": False}
                    )
                    times[name].append(1e3 * seconds(run, device, 1) / frames)
            flops = {name: vision_flops(network.config, image_size, mode) for name, network in networks.items()}
            ratios = [full / small for full, small in zip(times["full"], times["fovea"], strict=True)]
            result[mode] = {
                "milliseconds_per_frame": {name: statistics.median(values) for name, values in times.items()},
                "time_ratio": statistics.median(ratios),
                "vision_flops_per_frame": flops,
                "vision_flops_ratio": flops["full"] / flops["fovea"],
            }
    return result


def vision_flops(config: FoveatedVLMConfig, image_size: int, mode: str) -> float:
    """FLOPs of the vision encoder and of the queries for one frame."""
    config = copy.deepcopy(config)
    config.vision_config.image_size = image_size
    sample = flop_formulas.Sample(1, TEXT_BEFORE + TEXT_AFTER, TEXT_BEFORE, TEXT_AFTER)
    components = flop_formulas.forward(config, sample, mode).components
    return components.vision_encoder + components.query_passes


def fovea_table(result: dict[str, dict]) -> str:
    lines = [f"{'':<16}{'full':>12}{'fovea':>12}{'ratio':>8}"]
    for mode, values in result.items():
        times, flops = values["milliseconds_per_frame"], values["vision_flops_per_frame"]
        lines.append(f"{mode:<16}{times['full']:>9.2f} ms{times['fovea']:>9.2f} ms{values['time_ratio']:>8.2f}")
        full, small = (f"{flops[name] / 1e6:>8.1f} MFL" for name in ("full", "fovea"))
        lines.append(f"{'  vision FLOPs':<16}{full}{small}{values['vision_flops_ratio']:>8.2f}")
    return "\n".join(lines)


def table(frames: tuple[int, ...], result: dict[str, dict]) -> str:
    lines = [f"{'frames':<16}" + "".join(f"{count:>9}" for count in frames) + f"{'exponent':>10}"]
    for mode, values in result.items():
        for unit, key, name, factor in (("ms", "seconds", "time", 1e3), ("MiB", "peak_bytes", "memory", 1 / MIB)):
            numbers = "".join(f"{value * factor:9.1f}" for value in values[key])
            slope = values[f"{name}_exponent"]
            label = mode if key == "seconds" else ""
            lines.append(f"{label:<12}{unit:>4}{numbers}{'' if slope is None else f'{slope:10.2f}'}")
    return "\n".join(lines)


def read_config(arguments: argparse.Namespace) -> FoveatedVLMConfig:
    """The configuration to measure. UserError if the other arguments do not match it."""
    if arguments.config is None:
        config = default_config()
    elif (arguments.config / "config.json").exists():
        config = FoveatedVLMConfig.from_pretrained(arguments.config)
    else:
        raise UserError(
            f"{arguments.config}/config.json does not exist. Set --config to the folder of a trained model."
        )
    most, patch = max(arguments.frames), config.vision_config.patch_size
    if most > config.max_num_frames:
        raise UserError(
            f"--frames goes up to {most}, the network takes at most {config.max_num_frames}. Lower --frames."
        )
    if arguments.image_size % patch:
        raise UserError(
            f"--image-size is {arguments.image_size}, expected a multiple of the patch size {patch}. Round it."
        )
    if arguments.fovea:
        factor, size = arguments.fovea
        if factor < 2 or arguments.image_size % (factor * patch) or not 1 <= size <= arguments.image_size // patch:
            raise UserError(
                f"--fovea {factor} {size}: expected a factor of 2 or more by which {arguments.image_size // patch} "
                f"patches a side of --image-size {arguments.image_size} divide, and a window of 1 to so many patches."
            )
    return config


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of the modes over the number of frames.")
    parser.add_argument(
        "--config", type=Path, help="folder with the config.json of a model (default: a built-in configuration)"
    )
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--image-size", type=int, default=112, help="px")
    parser.add_argument(
        "--fovea", type=int, nargs=2, metavar=("R", "S"), help="compare with a fovea instead, at the most frames"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    config = read_config(arguments)
    if arguments.output:
        check_outputs(files=[arguments.output])
    torch.set_num_threads(arguments.num_threads)
    frames = tuple(sorted(arguments.frames))
    device = choose_device(arguments.device, "--device")
    settings = (arguments.image_size, device, arguments.repeats)
    if arguments.fovea:
        result = compare_fovea(config, *arguments.fovea, max(frames), *settings)
        print(fovea_table(result))
    else:
        result = measure(config, frames, *settings)
        print(table(frames, result))
    if arguments.output:
        about = {"device": device, "image_size": arguments.image_size, "num_threads": arguments.num_threads}
        write_json(arguments.output, {**about, "frames": list(frames), "modes": result})


if __name__ == "__main__":
    run_main(main)
