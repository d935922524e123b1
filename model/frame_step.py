"""Autoregressive mode as one fixed step per frame: the same operations on the same memory, whatever the frame.

A step attends with the planned query to one frame of every sample, reads the visual tokens with the language model and
plans the next query. Keys and values lie in tensors of fixed size, positions are counted on the device, and nothing
waits for the host. On CUDA the step is captured once per shape as a CUDA graph and replayed (`FrameStepGraph`); on a
CPU the same step runs eagerly.

Shapes: B samples, T steps, F frames of the whole batch, K queries and P visual tokens per frame, N patches, Q query
width, E language width, C head width, S places of the cache.
"""

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StaticCache
from transformers.utils import logging

from .foveated_encoder import EncodedFrames
from .outputs import FrameTokens
from .queries import stand_in
from .static_layers import PLACES, LanguageCache, QueryEncoder

KINDS = ("graph", "static", "dynamic")  # a captured step, the same step run eagerly, a cache that grows
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # rotary angles that do not depend on the length read so far
MAX_GRAPHS = 4  # captured steps that are kept per model
WARM_UP_STEPS = 3  # before a capture: libraries choose and allocate in the first calls

logger = logging.get_logger(__name__)


# ---------------------------------------------------------------- which step


def choose_step(model, wanted: str | None = None) -> str:
    """The kind of step, of KINDS, for this call of `model`.

    wanted: None takes `graph` on CUDA and `static` elsewhere. Where the step's fixed operations would not be those of
    the network, that is `dynamic`, with one note in the log; with gradients or in training it is so without a note.

    Raises ValueError for an unknown kind, or if `wanted` asks for a fixed step that is not possible.
    """
    if wanted not in (None, *KINDS):
        raise ValueError(f"frame_step={wanted!r} is not one of {', '.join(KINDS)} or None")
    if wanted == "dynamic":
        return wanted
    if torch.is_grad_enabled() or model.training:
        obstacle = "gradients are on or the model is in training mode (use eval() and torch.no_grad())"
    else:
        obstacle = step_obstacle(model)
        if obstacle and wanted is None:
            logger.warning_once(f"autoregressive mode reads with a growing cache, which is slower: {obstacle}")
    device = model.device.type
    if wanted == "graph" and device != "cuda":
        obstacle = f"the model is on {device}, a graph needs cuda"
    elif wanted == "graph" and not obstacle:
        obstacle = graph_obstacle(model)
    if obstacle and wanted is not None:
        raise ValueError(f"frame_step={wanted!r} is not possible: {obstacle}")
    if obstacle:
        return "dynamic"
    if wanted is not None:
        return wanted
    return "graph" if device == "cuda" and not graph_obstacle(model) else "static"


def step_obstacle(model) -> str | None:
    """Why a fixed step would not compute what the network computes, or None."""
    language = model.language_model
    if not isinstance(language, LlamaForCausalLM):
        return f"the language model is a {type(language).__name__}, not a LlamaForCausalLM"
    if language.model.rotary_emb.rope_type not in ROPE_TYPES:
        return f"rope_type={language.model.rotary_emb.rope_type!r} is not one of {', '.join(ROPE_TYPES)}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on (cast the weights instead: model.to(torch.bfloat16))"
    for module in itertools.chain(language.model.modules(), model.vision_encoder.encoder.modules()):
        own = vars(module)  # of layers the step reads the weights only
        if "_hf_hook" in own:
            return "the language model is spread over devices (device_map)"
        if _has_hooks(module):
            return "forward hooks are registered on layers, which the step does not call"
        if "in_features" in own and type(module) is not nn.Linear:
            kind = f"{type(module).__name__} of {type(module).__module__}"
            return f"a linear layer is a {kind}, not torch's Linear (adapters: merge_and_unload() merges them)"
    return None


def graph_obstacle(model) -> str | None:
    """Why a captured step would not do what the eager one does, or None."""
    hooked = any(_has_hooks(module) for module in model.modules() if module is not model.language_model.lm_head)
    return "forward hooks are registered, which a replayed graph does not run" if hooked else None


def _has_hooks(module) -> bool:
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


# ---------------------------------------------------------------- the step


@dataclass
class FrameInputs:
    """What a step is given: one frame of every sample."""

    keys: list[Tensor]  # per vision layer [B, heads, N + 1, C]
    values: list[Tensor]
    times: Tensor  # [B]
    active: Tensor  # bool [B]: the sample has this frame
    noise: Tensor | None = None  # [B, K, Q], for the query sources random and fixed
    allowed: Tensor | None = None  # bool [B, N + 1], for the query source oracle
    pixel_values: Tensor | None = None  # [B, 3, side, side], with a fovea
    temperature: Tensor | None = None  # [L], of QueryAttention; a captured step serves every one

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *self._others()]

    def _others(self) -> list[Tensor]:
        others = (self.times, self.active, self.noise, self.allowed, self.pixel_values, self.temperature)
        return [tensor for tensor in others if tensor is not None]

    def copy_(self, other: "FrameInputs") -> None:
        """Takes over the values of inputs of the same shapes; on CUDA, keys and values in one kernel, which takes one
        dtype only."""
        torch._foreach_copy_([*self.keys, *self.values], [*other.keys, *other.values])
        for own, value in zip(self._others(), other._others(), strict=True):
            own.copy_(value)

    def map(self, function) -> "FrameInputs":
        """The same with function(tensor) in place of every tensor."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            changed[field.name] = (
                [*map(function, value)] if isinstance(value, list) else None if value is None else function(value)
            )
        return FrameInputs(**changed)


class FrameStep:
    """Encodes, reads and plans one frame of every sample. Holds the state between frames, but not the model."""

    def __init__(self, model, batch_size: int, num_places: int, query_source: str, output_attentions: bool = False):
        """num_places: tokens that the cache must hold. query_source: of QUERY_SOURCES in the configuration."""
        self.query_source, self.output_attentions = query_source, output_attentions
        self.cache = LanguageCache(model, batch_size, num_places)
        is_plain = model.config.attention == "deep" and model.config.frame_downsampling == 1
        self.query_encoder = QueryEncoder(model.vision_encoder) if is_plain else None  # None: the network's own way
        self.queries = model.static_query.detach().expand(batch_size, -1, -1).clone()  # of the next frame [B, K, Q]

    def reset(self, first: Tensor) -> None:
        """Back to before the first frame, whose queries are `first` [K, Q]."""
        self.cache.reset()
        self.queries.copy_(first.expand_as(self.queries))

    def read_text(self, model, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Reads the text before the frames [B, S'], right-aligned."""
        if input_ids.shape[1]:
            self.cache.read(model.embed(input_ids, None), attention_mask.bool(), within=input_ids.shape[1])

    def __call__(self, model, inputs: FrameInputs) -> FrameTokens:
        """The tokens of one frame of every sample (fields as in FrameTokens with F = B)."""
        static = model.static_query.expand_as(self.queries)
        queries = stand_in(self.query_source, self.queries, static, inputs.noise)
        attention = replace(model._query_attention(), temperature=inputs.temperature, allowed=inputs.allowed)
        if self.query_encoder is None:
            encoded = EncodedFrames(inputs.keys, inputs.values, pixel_values=inputs.pixel_values)
            found = model._attend(queries, encoded, inputs.times, attention, self.output_attentions)
            tokens, weights = found.visual_tokens, found.attention_weights
        else:
            rows = model._query_rows(queries)  # [B, K, D]
            found = self.query_encoder(rows, inputs.keys, inputs.values, attention, self.output_attentions)
            features, weights = found
            tokens = model._tokens(features, inputs.times)
        embeddings = tokens.to(self.cache.bias.dtype)  # [B, P, E]
        present = inputs.active[:, None].expand(embeddings.shape[:2])
        planned = model.next_queries(self.cache.read(embeddings, present), self.queries)  # [B, K, Q]
        chosen = queries.clone() if queries is self.queries else queries  # the next line overwrites the state
        self.queries.copy_(planned)
        return FrameTokens(tokens, chosen, weights)


class FrameStepGraph(FrameStep):
    """A FrameStep whose operations are captured once and replayed. Its memory is its own, so that two captured steps
    of a model do not disturb each other."""

    def __init__(self, model, inputs: FrameInputs, *arguments):
        """inputs: an example. arguments: those of FrameStep."""
        super().__init__(model, *arguments)
        self.inputs, self.key = inputs.map(torch.clone), None
        step = super().__call__
        for _ in range(WARM_UP_STEPS):
            self.cache.reset()
            step(model, self.inputs)
        self.cache.reset()
        self._replay, self._outputs = capture_cuda(lambda: step(model, self.inputs), model.device)

    def __call__(self, model, inputs: FrameInputs) -> FrameTokens:
        self.inputs.copy_(inputs)
        self._replay()
        out = self._outputs
        weights = None if out.attention_weights is None else out.attention_weights.clone()
        return FrameTokens(out.visual_tokens.clone(), out.queries.clone(), weights)


def capture_cuda(function, device: torch.device):
    """Captures function(), whose work is on `device`, as a CUDA graph: (replay, its outputs, which every replay
    overwrites). The device need not be the current one, neither now nor at a replay."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_capture_stream(device)):
            outputs = function()
    return graph.replay, outputs


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """torch's own stream for captures is on the device of the process's first one."""
    return torch.cuda.Stream(device)


_lock = threading.Lock()
_graphs = WeakKeyDictionary()  # model -> OrderedDict of key -> FrameStepGraph: captured steps that nobody uses now


def take_step(model, kind: str, inputs: FrameInputs, *arguments) -> FrameStep:
    """A step of this kind for these `arguments` of FrameStep, for one user at a time: a captured one that somebody has
    given back if there is one for inputs of these shapes, unless the model's weights have moved since."""
    with torch.inference_mode(False), torch.no_grad():  # its memory may be used in and outside of inference mode
        return _take_step(model, kind, inputs, *arguments)


def _take_step(model, kind: str, inputs: FrameInputs, *arguments) -> FrameStep:
    if kind == "static":
        return FrameStep(model, *arguments)
    key = step_key(model, inputs, *arguments)
    with _lock:
        step = _graphs.setdefault(model, OrderedDict()).pop(key, None)
    if step is None:
        step = FrameStepGraph(model, inputs, *arguments)
        step.key = key
    return step


def release_step(model, step: FrameStep) -> None:
    """Keeps a captured step for the next `take_step`, MAX_GRAPHS of a model at most."""
    if not isinstance(step, FrameStepGraph):
        return
    with _lock:
        kept = _graphs.setdefault(model, OrderedDict())
        kept[step.key] = step
        while len(kept) > MAX_GRAPHS:
            kept.popitem(last=False)


def step_key(model, inputs: FrameInputs, batch_size: int, num_places: int, *others) -> tuple:
    """What a captured step depends on: shapes, options and where the weights lie (their values may change). Devices may
    have equal addresses one after the other."""
    config = model.config
    names = ("hard_attention", "attention_top_k", "query_update", "fovea_size")
    options = tuple(getattr(config, name) for name in names)
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs.tensors())
    kinds = tuple(given is not None for given in (inputs.noise, inputs.allowed, inputs.temperature))
    weights = (model.device, *(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())))
    return (batch_size, -(-num_places // PLACES), *others, options, shapes, kinds, config.visual_scale, weights)


# ---------------------------------------------------------------- a whole clip


def step_through_frames(
    model, kind: str, encoded: EncodedFrames, times: Tensor, first: Tensor, language, choose, attention, weights: bool
) -> FrameTokens:
    """Autoregressive mode over all frames of a batch by a step of this kind (`graph` or `static`).

    encoded: the vision encoder's keys and values of all frames; times [F]; first [F, K, Q]; language: VisualSequence;
    choose: QuerySource; attention: QueryAttention of the frames; weights: return attention weights.
    """
    counts = language.num_frames.tolist()
    num_steps, batch_size = max(counts), len(counts)
    steps = torch.arange(num_steps, device=times.device)[:, None]  # [T, 1]
    active = steps < language.num_frames  # [T, B]
    starts = language.num_frames.cumsum(0) - language.num_frames
    frames = starts + torch.minimum(steps, language.num_frames - 1)  # [T, B]: a sample without frame t shows its last
    ids, mask = language.text_before_frames()

    def inputs(t: int) -> FrameInputs:
        def select(values: Tensor) -> Tensor:
            return values[t : t + 1] if batch_size == 1 else values.index_select(0, frames[t])

        return FrameInputs(
            [*map(select, encoded.keys)],
            [*map(select, encoded.values)],
            select(times),
            active[t],
            None if choose.noise is None else select(choose.noise),
            None if attention.allowed is None else select(attention.allowed),
            None if encoded.pixel_values is None else select(encoded.pixel_values),
            attention.temperature,
        )

    start = inputs(0)
    num_places = ids.shape[1] + num_steps * model.config.tokens_per_frame
    step = take_step(model, kind, start, batch_size, num_places, choose.source, weights)
    step.reset(first[0])
    step.read_text(model, ids, mask)
    seen = [step(model, start if t == 0 else inputs(t)) for t in range(num_steps)]
    read = FramesRead.of(step.cache, num_places, language.rows, copy=kind == "graph")
    release_step(model, step)
    where = language.time_of_frame, language.sample_of_frame
    tokens = torch.stack([frame.visual_tokens for frame in seen])[where]  # [F, P, E]
    queries = torch.stack([frame.queries for frame in seen])[where]
    attended = torch.stack([frame.attention_weights for frame in seen], dim=1)[:, *where] if weights else None
    return FrameTokens(tokens, queries, attended, read)


@dataclass
class FramesRead:
    """The language model's keys and values up to the last frame of a batch: an answer goes on from them."""

    keys: Tensor  # [layers, B', G, S', C]
    values: Tensor
    is_real: Tensor  # bool [B', S']
    rows: Tensor  # int64 [B']: which samples of the batch; the others have no frames

    @classmethod
    def of(cls, cache: LanguageCache, num_places: int, rows: Tensor, copy: bool) -> "FramesRead":
        """copy: the cache goes on to be used."""
        held = cache.keys[..., :num_places, :], cache.values[..., :num_places, :], cache.bias[:, 0, 0, :num_places] == 0
        return cls(*(tensor.clone() if copy else tensor for tensor in held), rows)

    def prompt(self, model, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> dict | None:
        """Arguments of the language model's `generate` that read only what follows the frames: the filled cache, the
        embeddings and the mask. None if nothing follows them.

        input_ids, attention_mask [B, S]: the left-padded prompts.
        """
        batch_size, length = input_ids.shape
        is_visual = input_ids == model.config.visual_token_id
        after_frames = is_visual.flip(1).int().argmax(1)  # tokens after the last placeholder
        follows = torch.where(is_visual.any(1), after_frames, attention_mask.sum(1))  # [B]
        longest = int(follows.max())
        if longest == 0:
            return None
        places = torch.arange(length - longest, length, device=input_ids.device)
        mask = attention_mask[:, length - longest :] * (places >= length - follows[:, None])
        text = model.embed(input_ids[:, length - longest :].masked_fill(mask == 0, 0), None)
        past = self.keys.shape[3]
        is_real = mask.new_zeros(batch_size, past).index_copy(0, self.rows, self.is_real.to(mask.dtype))
        cache = StaticCache(config=model.config.text_config, max_cache_len=past + longest + max_new_tokens)
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(self._of_batch(keys, batch_size), self._of_batch(values, batch_size), index)
        return {
            "inputs_embeds": torch.cat([text.new_zeros(batch_size, past, text.shape[-1]), text], dim=1),
            "attention_mask": torch.cat([is_real, mask], dim=1),
            "past_key_values": cache,
        }

    def _of_batch(self, tensor: Tensor, batch_size: int) -> Tensor:
        """[B', G, S', C] -> [B, G, S', C], zeros for samples without frames."""
        if len(tensor) == batch_size:
            return tensor
        return tensor.new_zeros(batch_size, *tensor.shape[1:]).index_copy(0, self.rows, tensor)


def continues_from_cache(settings) -> bool:
    """Whether `generate` with this GenerationConfig can go on from a filled cache: one sequence per sample (beams and
    several answers are made by the library from one prompt), with the library's own cache."""
    several = (settings.num_beams or 1) > 1 or (settings.num_return_sequences or 1) > 1
    own_way = settings.cache_implementation or settings.use_cache is False
    return not (several or own_way)
