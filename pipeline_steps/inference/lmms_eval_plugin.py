"""lmms-eval model `foveated_vlm`: runs lmms-eval tasks on checkpoints of this repository.

    python -m lmms_eval --model foveated_vlm --model_args pretrained=outputs/stage3 --tasks pope --batch_size 8

lmms-eval finds the model by the entry point `foveated_vlm` in the group `lmms_eval.models`; docs/metrics.md describes
the installation. The checkpoint's processor prepares frames and chats exactly as in training.
"""

import difflib
import inspect
import json
import os
from pathlib import Path

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from model import FoveatedVLMForConditionalGeneration, FoveationOptions
from model.chat_messages import text_without_placeholders
from model.constants import MODES
from model.input_checks import check_inputs
from model.pictures import IMAGE_SUFFIXES
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError
from pipeline_steps.inference.answers import embedded_prompts
from pipeline_steps.inference.likelihood import answer_ids, answer_log_probs, check_answer_fits, last_control_token

OPTIONS = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
)  # passed on to Hugging Face's `generate`
UNUSED = ("image_aspect_ratio",)  # LLaVA's image preprocessing; ignored
SEED = 1  # for random query sources


def manifest():
    """The model manifest that the entry point returns."""
    return ModelManifest(model_id="foveated_vlm", simple_class_path=f"{__name__}.FoveatedVLM")


class Likelihood(tuple, GenerationResult):
    """(loss, whether greedy decoding gives the continuation), as lmms-eval's interface requires. Also a
    GenerationResult, because lmms-eval 0.7.3 converts every other result to text."""


class FoveatedVLM(lmms):
    """A checkpoint folder or a published checkpoint with lmms-eval's interface for simple models.

    pretrained: folder or name. device: default: this process's GPU, or the CPU without one. dtype: of the weights.
    mode: coarse, fine or autoregressive. max_new_tokens: default for tasks that set none.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "float32",
        mode: str = "autoregressive",
        max_new_tokens: int = 128,
        **unknown,
    ) -> None:
        super().__init__()
        check_arguments(unknown)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}, expected an integer of at least 1")
        if mode not in MODES:
            raise UserError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
        self.batch_size, self.mode, self.max_new_tokens = int(batch_size), mode, int(max_new_tokens)
        self.device = torch.device(own_device() if device in (None, "cuda") else device)
        network = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=getattr(torch, dtype))
        if not isinstance(network, FoveatedVLMForConditionalGeneration):
            raise UserError(f"{pretrained}: a {type(network).__name__}, expected a checkpoint of this repository")
        self.model = network.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.tokenizer = self.processor.tokenizer

    def generate_until(self, requests) -> list[str]:
        """The answer to every request (context, generation options, doc_to_visual, doc_id, task, split), cut at the
        first stop string of the task."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with equal generation options
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answers", unit="item") as progress:
            for key, numbers in groups.items():
                options, stops = self._options(json.loads(key))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    texts = self._answers([requests[n].args for n in batch], options)
                    for number, text in zip(batch, texts, strict=True):
                        found[number] = cut(text, stops)
                        self.cache_hook.add_partial("generate_until", requests[number].args[:2], found[number])
                    progress.update(len(batch))
        return found

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(loss, whether greedy decoding gives the continuation) of every request (context, continuation,
        doc_to_visual, doc_id, task, split); the continuation may be a function of the document.

        The loss is the continuation's negative log-probability, without the end-of-turn token, in nats: lmms-eval's
        multiple-choice tasks choose the SMALLEST value, and divide by the number of characters for `acc_norm`. Encodes
        the frames once per context, for all its continuations.
        """
        found: list = [None] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            context, _, *place = request.args
            groups.setdefault((context, *place[1:]), []).append(number)
        for numbers in tqdm(groups.values(), disable=self.rank != 0, desc="likelihoods", unit="context"):
            for number, pair in zip(numbers, self._losses([requests[n].args for n in numbers]), strict=True):
                found[number] = pair
                self.cache_hook.add_partial("loglikelihood", requests[number].args[:2], pair)
        return found

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError(
            "FoveatedVLM encodes the frames for a single question: multi-round tasks are not supported"
        )

    # ---- one batch, one context

    def _answers(self, batch, options):
        visuals = [self._visual(*arguments[2:6]) for arguments in batch]
        inputs = self.processor(
            text=[text_without_placeholders(arguments[0]) for arguments in batch], videos=visuals
        ).to(self.device)
        room = self.model.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
        options = options | {"max_new_tokens": min(options["max_new_tokens"], room)}
        end = self.tokenizer.eos_token_id
        ids = self.model.generate(
            **inputs, mode=self.mode, options=self._foveation(), eos_token_id=end, pad_token_id=end, **options
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _losses(self, batch):
        context, _, *place = batch[0]
        answers = [self._continuation(*arguments) for arguments in batch]
        prompt, prompts = self._prompt(context, self._visual(*place) if place else None)
        where = f"the context {context[:60]!r}"
        ids = [answer_ids(self.tokenizer, prompt, answer, where) for answer in answers]
        check_answer_fits(self.model.config, where, prompts.shape[1], max(map(len, ids)))
        log_probs, most_likely = answer_log_probs(self.model, prompts, ids)
        return [Likelihood((-row.sum().item(), hits)) for row, hits in zip(log_probs, most_likely, strict=True)]

    def _prompt(self, context, visual):
        """(text ids, embeddings [1, S, E]) of the chat up to the answer. For a blank context only the opening of the
        answer's turn, without a question."""
        blank = not context.strip() and visual is None
        inputs = self.processor(text="?" if blank else text_without_placeholders(context), videos=visual).to(
            self.device
        )
        ids = inputs["input_ids"]
        if blank:
            last = last_control_token(self.tokenizer, ids[0].tolist())
            return ids[0, last:].tolist(), self.model.embed(ids[:, last:], None)
        foveation = self._foveation()
        check_inputs(self.model.config, **inputs, mode=self.mode, options=foveation)
        text = ids[ids != self.model.config.visual_token_id].tolist()
        return text, embedded_prompts(self.model, inputs, self.mode, foveation)

    def _foveation(self):
        return FoveationOptions(generator=torch.Generator(self.device).manual_seed(SEED))

    # ---- task inputs

    def _visual(self, doc_to_visual, doc_id, task, split):
        return as_video(doc_to_visual(self.task_dict[task][split][doc_id]), f"task {task}, document {doc_id}")

    def _continuation(self, context, continuation, *place):
        if callable(continuation):
            _, doc_id, task, split = place
            continuation = continuation(self.task_dict[task][split][doc_id])
        return str(
            continuation
        ).strip()  # the chat template puts a line break before the answer, not the task's delimiter

    def _options(self, given):
        """(options of `generate`, stop strings) of a task's generation_kwargs."""
        stops = [text for name in ("until", "stop_sequences") for text in as_list(given.pop(name, None))]
        options = {"max_new_tokens": given.pop("max_new_tokens", self.max_new_tokens)}
        options |= {name: given.pop(name) for name in OPTIONS if given.get(name) is not None}
        unknown = {name for name, value in given.items() if value is not None} - {*UNUSED, *OPTIONS}
        if unknown:
            raise UserError(
                f"generation_kwargs of a task contain unsupported {', '.join(sorted(unknown))}; supported: "
                f"max_new_tokens, until, stop_sequences, {', '.join(OPTIONS)}. "
                "Remove them with --gen_kwargs or in the task's file."
            )
        samples = bool(options.get("do_sample", "temperature" in options))
        options["do_sample"] = samples and options.get("temperature") != 0  # tasks ask for greedy decoding by 0, too
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        return options, stops


def check_arguments(unknown):
    """UserError that suggests the right spelling if there are unknown arguments."""
    known = [name for name in inspect.signature(FoveatedVLM.__init__).parameters if name not in ("self", "unknown")]
    wrong = []
    for name in sorted(unknown):
        close = difflib.get_close_matches(name, known, 1)
        wrong.append(f"'{name}'" + (f" (did you mean '{close[0]}'?)" if close else ""))
    if wrong:
        raise UserError(f"--model_args: unknown argument {', '.join(wrong)}. The arguments are {', '.join(known)}.")


def own_device():
    """The GPU of this process, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if choose_device() == "cuda" else "cpu"


def as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def cut(text, stops):
    """The text before the first stop string."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)].strip() if ends else text


def as_video(visuals, where):
    """A document's visuals as the processor takes them: None, a path, one image, or a list of images. UserError,
    prefixed with `where`, for anything else."""
    visuals = [] if visuals is None else visuals if isinstance(visuals, list | tuple) else [visuals]
    if not visuals:
        return None
    if len(visuals) == 1 and isinstance(visuals[0], str | os.PathLike | Image.Image):
        return visuals[0]
    if all(isinstance(visual, str | os.PathLike) for visual in visuals):
        if all(Path(visual).suffix.lower() in IMAGE_SUFFIXES for visual in visuals):
            return [Image.open(visual) for visual in visuals]
    elif all(isinstance(visual, Image.Image) for visual in visuals):
        return list(visuals)
    kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
    raise UserError(f"{where}: {len(visuals)} visuals of type {kinds}, expected one video, or images only")
