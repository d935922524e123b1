"""Follow a video that is still being written, or a folder in which frames appear: `ask --follow`.

    python -m pipeline_steps.inference.ask --checkpoint outputs/stage3 --video camera.ts --follow --every 10 \\
        --question "Which digits does red show?"

Prints a line per frame with the position of the most attention, the answer after every `--every` frames, and the answer
at the end: when nothing has been added for `--idle` seconds. Ctrl-C ends it at once (code 130). A video is sampled at
the checkpoint's frames per second. It must be of a kind that can be read before it is finished: .ts and .mkv can, an
.mp4 only if it is fragmented. Pictures of a folder are taken in the order of their names among those that are new.
"""

import time
from bisect import bisect_right
from pathlib import Path

from model.frames import SAME_TIME, decode, read_index
from model.pictures import IMAGE_SUFFIXES, MediaError, Piece, file_size, load_image
from pipeline_steps.common.errors import UserError

POLL_SECONDS = 0.5
IDLE_SECONDS = 10.0  # without growth until a video counts as finished, unless --idle says otherwise


class GrowingFolder:
    """Pictures that appear in a folder. A picture that is not whole yet is tried again."""

    def __init__(self, path: Path, fps: float, hdr: str):
        self.path, self.fps, self.hdr = path, fps, hdr
        self.taken, self.unreadable = set(), {}  # names; name -> why it could not be read the last time

    def state(self):
        """Changes whenever something is added."""
        return sorted((file.name, file.stat().st_size) for file in self._files())

    def new_frames(self, is_final: bool):
        """Yields (seconds, PIL image) of what is new; a picture every 1 / fps seconds. is_final: nothing will come."""
        for file in self._files():
            if file.name in self.taken:
                continue
            try:
                image = load_image(file, self.hdr)
            except MediaError as error:
                self.unreadable[file.name] = error.reason
                continue
            self.unreadable.pop(file.name, None)
            self.taken.add(file.name)
            yield (len(self.taken) - 1) / self.fps, image

    def problems(self) -> list[str]:
        return [f"{self.path / name}: {reason}" for name, reason in sorted(self.unreadable.items())]

    def _files(self):
        files = [file for file in self.path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        return sorted(file for file in files if not file.name.startswith("."))


class GrowingVideo:
    """A video file that is still being written, sampled at `fps`."""

    def __init__(self, path: Path, fps: float, image_size: int, resize_mode: str, hdr: str):
        self.path, self.fps = path, fps
        self.settings = (image_size, resize_mode, hdr)
        self.num_taken, self.problem = 0, None

    def state(self):
        """Changes whenever something is added."""
        return self.path.stat().st_size

    def new_frames(self, is_final: bool):
        """Yields (seconds, square PIL image) of the frames on screen at multiples of 1 / fps that are not taken yet.

        A frame counts as long as a later one has not been written, except where is_final: nothing will come.
        """
        try:
            piece = Piece(str(self.path), file_size(self.path))
            index = read_index(piece)
            times = index.times if is_final else index.times[:-1]  # the last one may be half written
            wanted = []
            while times and (due := (self.num_taken + len(wanted)) / self.fps) <= times[-1] + SAME_TIME:
                wanted.append(times[bisect_right(times, due + SAME_TIME) - 1])
            taken = decode(piece, index, wanted, *self.settings) if wanted else []
        except MediaError as error:
            self.problem = error.reason
            return
        self.problem = None
        for image, seconds, _ in taken:
            self.num_taken += 1
            yield seconds, image

    def problems(self) -> list[str]:
        return [] if self.problem is None else [f"{self.path}: {self.problem}"]


def follow(session, source, every: int | None, idle_seconds: float, max_new_tokens: int, say=print) -> None:
    """Pushes what appears in `source` into the session until it stays the same for `idle_seconds`.

    every: answer after so many frames (None: at the end only). say: prints a line. UserError if no frame was readable,
    or the session is full.
    """

    def answer():
        say(f"answer after {session.num_frames} frames: {session.ask(max_new_tokens=max_new_tokens)}")

    before, since, is_final, answered = None, time.monotonic(), False, -1
    while not is_final:
        now = source.state()
        if now != before:
            before, since = now, time.monotonic()
        is_final = time.monotonic() - since >= idle_seconds
        for seconds, frame in source.new_frames(is_final):
            if session.num_frames == session.max_num_frames:
                raise UserError(
                    f"{source.path}: more than {session.max_num_frames} frames. Raise --max-num-frames; the model was "
                    f"trained with at most {session.model.config.max_num_frames}."
                )
            say(f"frame {session.num_frames} at {seconds:.1f} s: {gaze(session.push(frame, seconds))}")
            if every is not None and session.num_frames % every == 0:
                answer()
                answered = session.num_frames
        if not is_final:
            time.sleep(min(POLL_SECONDS, idle_seconds))
    for problem in source.problems():
        say(f"{problem}, not taken")
    if not session.num_frames:
        raise UserError(f"{source.path}: no frame could be read within {idle_seconds:g} s. Raise --idle, or check it.")
    if answered != session.num_frames:
        answer()


def gaze(attention) -> str:
    """The strongest patch of an attention map [rows, columns] in words."""
    rows, columns = attention.shape
    row, column = divmod(int(attention.argmax()), columns)
    share = 100 * float(attention.max())
    return f"most attended: row {row + 1} of {rows}, column {column + 1} of {columns} ({share:.0f} %)"


def check(arguments) -> None:
    """Raises UserError where options of `ask` do not go with --follow, before any weight is loaded."""
    if not arguments.follow:
        given = [name for name in ("every", "idle", "max_num_frames") if getattr(arguments, name) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --follow only. Give both or neither.")
        return
    if arguments.video is None or not arguments.video.exists():
        raise UserError(f"--follow: {arguments.video}: no such file or folder. Correct --video.")
    if arguments.output is not None:
        raise UserError(f"--output {arguments.output}: --follow writes no animation. Leave --output out.")
    if arguments.mode != "autoregressive":
        raise UserError(f"--mode {arguments.mode}: --follow reads frame by frame. Use --mode autoregressive.")
    for name in ("every", "idle", "max_num_frames"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}, expected more than 0")


def run(arguments, model, processor) -> None:
    """`ask --follow` with a loaded checkpoint. UserError for invalid input."""
    path = arguments.video
    if path.is_dir():
        source = GrowingFolder(path, processor.fps, processor.hdr)
    else:
        settings = (processor.image_size, processor.resize_mode, processor.hdr)
        source = GrowingVideo(path, processor.fps, *settings)
    try:
        with model.stream(processor, arguments.question, arguments.max_num_frames) as session:
            follow(session, source, arguments.every, arguments.idle or IDLE_SECONDS, arguments.max_new_tokens, flushed)
    except ValueError as error:
        raise UserError(str(error)) from None


def flushed(line: str) -> None:
    print(line, flush=True)
