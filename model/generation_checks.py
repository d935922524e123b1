"""Refuses ways to generate that would be wrong or fail late.

The language model is given embeddings of text and visual tokens, so that the library does not see the prompt's ids, and
its cache is filled from the frames. What needs these ids, another model, or a cache of the caller's is refused.
"""

from transformers import GenerationConfig

from .input_checks import check_new_tokens

DEFAULT_NEW_TOKENS = 20  # the library's
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
NEEDS_PROMPT_IDS = {  # {option of GenerationConfig: value that turns it off, besides None}
    "prompt_lookup_num_tokens": None,
    "guidance_scale": 1,
    "token_healing": False,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "prefill_chunk_size": None,
}
ARGUMENTS = {  # {argument: why not}
    "inputs_embeds": "the frames belong to the placeholders of input_ids. Pass input_ids and pixel_values",
    "past_key_values": "a cache of an earlier call may hold other frames or another question. Pass the whole prompt, "
    "or use model.stream, which goes on from its own cache",
    "position_ids": "positions are counted from attention_mask. Leave it out",
    "cache_position": "positions are counted from attention_mask. Leave it out",
    "assistant_model": "a draft model does not see the frames. Leave it out",
    "negative_prompt_ids": "a prompt without the frames cannot be read besides. Leave it out",
    "custom_generate": "it would be given embeddings, not the prompt's ids. Use an option of the library's own",
}
CONTINUOUS = "continuous batching reads ids, without frames. Pass a batch of samples to generate"


def check_generation(settings: GenerationConfig, others: dict) -> None:
    """Raises ValueError unless `generate` with this configuration and these other arguments (those that are no fields
    of it) is greedy, sampling or beam search from the given prompt."""
    for name, reason in ARGUMENTS.items():
        if others.get(name) is not None:
            raise ValueError(f"generate: {name} is not supported: {reason}")
    for name, off in NEEDS_PROMPT_IDS.items():
        value = getattr(settings, name, None)
        if value is not None and value != off:
            raise ValueError(
                f"generate: {name}={value!r} is not supported: it needs the ids of the whole prompt, but frames are "
                "embeddings. Leave it out"
            )
    if settings.cache_implementation == "paged":
        raise ValueError(f"generate: cache_implementation='paged' is not supported: {CONTINUOUS}")
    mode = settings.get_generation_mode().value
    if mode not in MODES:
        raise ValueError(f"generate: {mode} is not supported, expected one of {', '.join(MODES)}")


def set_new_tokens(settings: GenerationConfig, config, length: int) -> None:
    """Sets max_new_tokens for a prompt of this length, from max_length or the default if it is not given.

    Raises ValueError if max_length leaves no room, or the answer may exceed the language model's context.
    """
    if settings.max_new_tokens is None and settings.max_length is None:
        settings.max_new_tokens = DEFAULT_NEW_TOKENS
    elif settings.max_new_tokens is None:
        settings.max_new_tokens = settings.max_length - length
        if settings.max_new_tokens < 1:
            raise ValueError(
                f"max_length={settings.max_length} counts the prompt, which has {length} tokens, frames included. "
                "Raise it, or pass max_new_tokens instead"
            )
    settings.max_length = None
    check_new_tokens(config, length, settings.max_new_tokens)


class GenerationChecksMixin:
    """Refuses the library's other entrances to generation."""

    def generate_batch(self, *args, **kwargs):
        """Not supported: raises ValueError."""
        raise ValueError(f"generate_batch is not supported: {CONTINUOUS}")

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: raises ValueError."""
        raise ValueError(f"init_continuous_batching is not supported: {CONTINUOUS}")
