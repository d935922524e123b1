"""Streaming inference: frames are pushed one by one, and questions asked at any time.

Shapes: P visual tokens per frame, E language width, S places of the cache.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from .frame_step import FrameInputs, FramesRead, choose_step, continues_from_cache, release_step, take_step
from .generation_checks import check_generation, set_new_tokens

ANSWER_TOKENS = 64  # that `ask` may generate unless told otherwise


class StreamingMixin:
    """`stream` of `FoveatedVLMForConditionalGeneration`."""

    def stream(self, processor, question: str | None = None, max_num_frames: int | None = None) -> "StreamingSession":
        """A session that takes the frames of one video as they come, and answers at any time.

        processor: the checkpoint's. question: what the gaze serves (layout question_first, which needs it) and what
        `ask` answers unless told otherwise. max_num_frames: frames that the session can take; None: the
        configuration's. Memory for them is taken at the start and does not grow: keys and values of P tokens per frame.

        Raises ValueError if the model has no planned queries, the question is missing or wrong, or the frames do not
        fit into the language model's positions.
        """
        return StreamingSession(self, processor, question, max_num_frames)


class StreamingSession:
    """One video, frame by frame: made by `model.stream`. Not for several threads at once.

    `with model.stream(...) as session:` gives a captured step back at the end, for the next session to use.
    """

    @torch.no_grad()
    def __init__(self, model, processor, question: str | None = None, max_num_frames: int | None = None):
        config = model.config
        if config.architecture != "foveated" or config.coarse_only or config.query_source != "planned":
            raise ValueError(
                f"architecture={config.architecture!r}, coarse_only={config.coarse_only}, query_source="
                f"{config.query_source!r}: a session plans every query from the frames before. Use generate instead"
            )
        if config.layout == "question_first" and question is None:
            raise ValueError("the layout is question_first, where the question comes before the frames: give question")
        self.model, self.processor, self.question = model, processor, question
        self.max_num_frames = config.max_num_frames if max_num_frames is None else max_num_frames
        self.num_frames, self._is_closed = 0, False
        self._before, after = self._text_around_frames("?" if question is None else question)
        num_places = len(self._before) + self.max_num_frames * config.tokens_per_frame
        limit = config.text_config.max_position_embeddings
        if self.max_num_frames < 1 or num_places + len(after) >= limit:
            raise ValueError(
                f"max_num_frames={self.max_num_frames} with {config.tokens_per_frame} tokens each and "
                f"{len(self._before) + len(after)} of text do not fit into the language model's {limit} positions and "
                f"leave room for an answer: give from 1 to "
                f"{(limit - 1 - len(self._before) - len(after)) // config.tokens_per_frame}"
            )
        self._kind = choose_step(model)
        if self._kind == "dynamic":
            choose_step(model, "static")  # says why a session is not possible
        self._num_places, self._step = num_places, None
        width = config.text_config.hidden_size
        shape = (self.max_num_frames, config.tokens_per_frame, width)
        with torch.inference_mode(False):  # may be written in and outside of inference mode
            self.visual_tokens = torch.zeros(shape, dtype=model.connector.weight.dtype, device=model.device)

    @torch.no_grad()
    def push(self, frame, time: float | None = None) -> Tensor:
        """Reads the next frame and returns the attention over the grid of patches, float32
        [rows, columns], sum 1 (mean over heads and queries of the last layer), or all 0 without attention to patches.

        frame: PIL image or uint8 array [height, width, 3] (cut and compressed as the training data's), or normalised
        pixels, float [3, height, width]. time: seconds from the start, for a model with frame_time_embedding; by
        default frames are 1 / processor.fps apart.

        Raises ValueError for another form, beyond max_num_frames, or after close.
        """
        self._check_open()
        if self.num_frames == self.max_num_frames:
            raise ValueError(
                f"the session holds {self.num_frames} frames, as many as it can: start another, or give stream a "
                f"larger max_num_frames (the model was trained with at most {self.model.config.max_num_frames})"
            )
        inputs, grid = self._inputs(frame, self.num_frames / self.processor.fps if time is None else time)
        if self._step is None:
            self._start(inputs)
        seen = self._step(self.model, inputs)
        self.visual_tokens[self.num_frames] = seen.visual_tokens[0]
        self.num_frames += 1
        attention = seen.attention_weights[-1, 0].float().mean((0, 1))[1:]  # [N], without the class token
        return (attention / attention.sum().clamp(min=torch.finfo(torch.float32).tiny)).view(grid)

    @torch.no_grad()
    def ask(self, question: str | None = None, **generation_options) -> str:
        """The answer to a question about the frames so far. The session goes on as if nothing had been asked.

        question: by default the session's own. In the layout question_first another question is answered from the
        visual tokens that were seen for the session's question, read again after the new one. generation_options: the
        library's; greedy and at most ANSWER_TOKENS new tokens unless given.

        Raises ValueError without a question or a limit of new tokens, for several answers, after close, or if the
        answer does not fit into the language model's positions.
        """
        self._check_open()
        model, tokenizer = self.model, self.processor.tokenizer
        question = self.question if question is None else question
        if question is None:
            raise ValueError("the session was started without a question: give ask one")
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        new_tokens = None if "max_length" in generation_options else ANSWER_TOKENS
        options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        settings = copy.deepcopy(model.generation_config)
        others = settings.update(**(options | {"pad_token_id": pad_id, "disable_compile": True} | generation_options))
        check_generation(settings, others)
        if settings.max_new_tokens is None and settings.max_length is None:
            raise ValueError("max_new_tokens=None and no max_length: pass one, or neither for the default")
        if (settings.num_return_sequences or 1) > 1:
            raise ValueError(
                f"num_return_sequences={settings.num_return_sequences}, but ask returns 1 answer. Call it several times"
            )
        before, after = self._text_around_frames(question)
        visual = [model.config.visual_token_id] * (self.num_frames * model.config.tokens_per_frame)
        ids = [*before, *visual, *after] if visual else self._text_only(question)
        set_new_tokens(settings, model.config, len(ids))
        input_ids = torch.tensor([ids], device=model.device)
        mask = torch.ones_like(input_ids)
        own_cache = visual and before == self._before and self._step is not None
        if own_cache and continues_from_cache(settings):
            row = torch.zeros(1, dtype=torch.long, device=model.device)
            num_read = len(before) + len(visual)
            read = FramesRead.of(self._step.cache, num_read, row, copy=False)
            prompt = read.prompt(model, input_ids, mask, settings.max_new_tokens)
        else:
            tokens = self.visual_tokens[: self.num_frames] if visual else None
            prompt = {"inputs_embeds": model.embed(input_ids, tokens), "attention_mask": mask}
        answer = model.language_model.generate(**prompt, generation_config=settings, **others)
        return tokenizer.decode(answer[0], skip_special_tokens=True).strip()

    def close(self) -> None:
        """Ends the session: no more frames or questions."""
        step, self._step, self._is_closed = self._step, None, True
        if step is not None:
            release_step(self.model, step)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"the session was closed after {self.num_frames} frames. Start another with model.stream")

    def __enter__(self) -> "StreamingSession":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _start(self, inputs: FrameInputs) -> None:
        """Takes a step, which stays the session's own, and reads the text before the frames."""
        model = self.model
        self._step = step = take_step(model, self._kind, inputs, 1, self._num_places, "planned", True)
        step.reset(model.static_query if model.config.tie_first_query else model.first_query)
        ids = torch.tensor([self._before], dtype=torch.long, device=model.device)
        step.read_text(model, ids, torch.ones_like(ids))

    def _inputs(self, frame, time: float) -> tuple[FrameInputs, tuple[int, int]]:
        """(what a step is given, rows and columns of the patches)."""
        model = self.model
        if torch.is_tensor(frame):
            if not frame.is_floating_point() or frame.ndim != 3:
                raise ValueError(
                    f"frame is {frame.dtype} {list(frame.shape)}, expected normalised floats [3, height, width], a PIL "
                    "image or an array uint8 [height, width, 3]"
                )
            pixels = frame[None]
        else:
            pixels = torch.from_numpy(self.processor.pixel_values([frame]))
        pixels = pixels.to(model.device, model.connector.weight.dtype)
        if model.config.blind:
            pixels = torch.zeros_like(pixels)
        attention = model._query_attention()
        encoded, _ = model._encode(pixels, None, None, attention, False)
        if model.config.frame_time_embedding == "none":
            time = self.num_frames
        times = torch.full((1,), float(time), device=model.device)
        patch = model.config.vision_config.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        active = torch.ones(1, dtype=torch.bool, device=model.device)
        others = {"pixel_values": encoded.pixel_values, "temperature": attention.temperature}
        return FrameInputs(encoded.keys, encoded.values, times, active, **others), grid

    def _text_around_frames(self, question: str) -> tuple[list[int], list[int]]:
        """The chat's ids before and after the frames, as the processor writes them."""
        self.processor.check_question(question)
        size = self.processor.image_size
        blank = np.zeros((1, size, size, 3), np.uint8)
        ids = self.processor(text=question, videos=blank)["input_ids"][0]
        places = (ids == self.model.config.visual_token_id).nonzero()[:, 0]
        return ids[: places[0]].tolist(), ids[places[-1] + 1 :].tolist()

    def _text_only(self, question: str) -> list[int]:
        return self.processor(text=question)["input_ids"][0].tolist()
