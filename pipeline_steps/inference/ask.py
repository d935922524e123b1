"""Ask a checkpoint about a video, a picture, or nothing but the question.

    python -m pipeline_steps.inference.ask --checkpoint outputs/stage3 --video clip.mp4 \\
        --question "Which digits does red show?"

Prints the answer as it is generated (greedy) and writes an animation of where the model looked, NAME.heatmap.gif in the
current folder unless --output says otherwise. Without --video the model answers from the text alone. Needs no shards
and no parameters: the checkpoint knows how its frames and chats are made. Cost: the import of the libraries and two
looks at the frames; on an embedded checkpoint about five seconds and 0.5 GB.
"""

import argparse
import io
import os
import signal
import sys
from pathlib import Path

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_bytes

MODES = ("coarse", "fine", "autoregressive")  # model.configuration_foveated_vlm.MODES, without its import of torch
SIDE = 224  # px, of one frame of the animation
FRAME_MILLISECONDS = 700
SEED = 1  # of the query sources that draw at random: the animation shows the very look that was answered from


def main():
    try:
        ask(read_arguments())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader wants no more, as in `ask ... | head -c 1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 128 + signal.SIGPIPE
    return 0


def command():
    """The console script foveated-ask."""
    run_main(main)


def ask(arguments):
    """Prints the answer and writes the animation. UserError for what the user can correct."""
    output = check(arguments)
    from transformers.utils import logging as transformers_logging

    from pipeline_steps.common.checkpoint import load_checkpoint
    from pipeline_steps.common.device import choose_device

    transformers_logging.disable_progress_bar()
    model, processor = load_checkpoint(arguments.checkpoint)
    model.to(choose_device())
    try:
        inputs = processor(text=arguments.question, videos=arguments.video)
        answer = stream_answer(model, processor, inputs, arguments.mode, arguments.max_new_tokens)
    except ValueError as error:
        raise UserError(str(error)) from None
    if output is None:
        return
    if model.config.architecture != "foveated":
        print(f"{output}: not written, a model without queries looks everywhere")
        return
    write_bytes(output, animation(model, processor, inputs, arguments.mode, arguments.question, answer))
    print(f"{output}: where the model looked")


def read_arguments():
    parser = argparse.ArgumentParser(description="Ask a checkpoint about a video.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a trained model, e.g. outputs/stage3")
    parser.add_argument("--question", required=True)
    parser.add_argument("--video", type=Path, help="video or image file; without it the question is text only")
    parser.add_argument("--mode", choices=MODES, default="autoregressive", help="how the model looks")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--output", type=Path, help="the animation (default: NAME.heatmap.gif in the current folder)")
    return parser.parse_args()


def check(arguments):
    """UserError before any weight is loaded; returns where the animation goes, None without a video."""
    if not arguments.question.strip():
        raise UserError("--question is empty: ask something")
    try:
        arguments.question.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--question {arguments.question!r}: not UTF-8 text at character {error.start + 1}. Write it in UTF-8."
        ) from None
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}, expected at least 1")
    if arguments.video is None:
        if arguments.output is not None:
            raise UserError(
                f"--output {arguments.output}: there is no look to draw without --video. Give both or none."
            )
        return None
    if not arguments.video.is_file():
        raise UserError(f"{arguments.video}: no such file. Correct --video.")
    output = arguments.output or Path(f"{arguments.video.stem}.heatmap.gif")
    if output.suffix.lower() != ".gif":
        raise UserError(f"{output}: the animation is a GIF file, give --output a name that ends with .gif")
    if output.exists() and output.samefile(arguments.video):
        raise UserError(f"{output}: --output and --video are the same file. Give --output another name.")
    check_outputs(files=[output])
    return output


def stream_answer(model, processor, inputs, mode, max_new_tokens):
    """Prints the greedy answer word by word and returns it."""
    import torch
    from transformers import TextStreamer

    from model.input_checks import check_room

    tokenizer = processor.tokenizer
    check_room(model.config, inputs["input_ids"].shape[1], max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with torch.inference_mode():
            ids = model.generate(
                **inputs.to(model.device),
                mode=mode,
                generator=generator(model),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                streamer=streamer,
            )
    except KeyboardInterrupt:
        print(flush=True)  # the line that was begun
        raise
    return processor.decode(ids[0], skip_special_tokens=True).strip()


def animation(model, processor, inputs, mode, question, answer):
    """The bytes of a GIF: every frame, and where the last layer's attention fell in it."""
    import torch

    from pipeline_steps.inference import drawing, gaze

    with torch.inference_mode():
        looked = model(**inputs.to(model.device), mode=mode, generator=generator(model), output_attentions=True)
    maps = gaze.attention_maps(looked.attention_weights.float().cpu().numpy())[-1]  # [F, N]
    clip = drawing.Clip(
        frames=processor.pictures(inputs["pixel_values"].cpu()),
        maps={"coarse" if model.config.coarse_only else mode: maps},
        boxes=None,
        title="",
        question=question,
        answer=None,
        prediction=answer,
    )
    file = io.BytesIO()
    drawing.save_animation(drawing.animation(clip, SIDE), file, FRAME_MILLISECONDS)
    return file.getvalue()


def generator(model):
    import torch

    return torch.Generator(model.device).manual_seed(SEED)


if __name__ == "__main__":
    run_main(main)
