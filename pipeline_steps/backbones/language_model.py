"""A tiny Llama, warmed up on copying and on keeping a topic in mind.

The task: a user gives a random row of tokens, followed by blanks (noise instead of a token, where later stages put
frames), and the assistant repeats the row, in the chat format of every later stage. One word of each chat is its topic,
a colour's or a place's name, in the row or in the first blank; the model's state at every blank has to name it. So it
leaves with induction heads, i.e. it can read something that stands earlier in its context, and with a sense of what the
context is about. Every answer about visual tokens needs both, and a pretrained language model brings them along.

Shapes: B chats, S tokens, E width, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline_steps import world

from .schema import Embedded
from .warm_up import optimise

MIN_LENGTH, MAX_LENGTH = 3, 10  # tokens in a row to copy
MAX_BLANKS = 6  # after it
TOPIC_NOISE = 0.5  # standard deviation, in that of the embeddings, around a topic in a blank
OUTPUT_GAIN = 0.4  # of the output projection over the value projection at the start
NUM_HELD_OUT = 512  # chats of new rows


def build_language_model(options: Embedded, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings and grouped-query attention, randomly initialised.

    The output projection starts as the transposed value projection, so that attention hands on what it reads (Trockman
    and Kolter 2023, "Mimetic Initialization of Self-Attention Layers"): without it copying takes several times longer.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.language_width,
        intermediate_size=4 * options.language_width * 2 // 3,
        num_hidden_layers=options.language_layers,
        num_attention_heads=options.language_heads,
        num_key_value_heads=options.language_kv_heads,
        max_position_embeddings=options.max_positions,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        attention, head = layer.self_attn, config.head_dim
        nn.init.orthogonal_(attention.v_proj.weight)
        value = attention.v_proj.weight.data.view(config.num_key_value_heads, head, -1)
        value = value.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=0).flatten(0, 1)
        attention.o_proj.weight.data.copy_(OUTPUT_GAIN * value.T)
    return model


@dataclass
class Chats:
    """A batch of the warm-up task; all chats have the same layout. Hidden state s has to name targets[:, s]."""

    input_ids: Tensor  # [B, S]
    targets: Tensor  # [B, S], -100 where nothing is asked
    topic: Tensor  # [B]
    blanks: slice  # positions, in S
    topic_in_blank: Tensor  # bool [B]: the topic stands in the first blank, not in the row
    noise: Tensor  # [B, blanks, E], standard deviation 1


class WarmUpTask:
    """Random rows of tokens in the chat format, with blanks and a topic."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int):
        def ids(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text))

        self.before = ids("<|im_start|>user\n")
        self.between = ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = ids("<|im_end|>")
        words = [*world.COLOUR_NAMES, *sorted({word for place in world.PLACES for word in place.split()})]
        self.topics = torch.cat([ids(form) for word in words for form in (word, f" {word}")])
        others = set(range(len(tokenizer.all_special_tokens), len(tokenizer))) - set(self.topics.tolist())
        self.others = torch.tensor(sorted(others))
        self.width = width

    def batch(self, num_chats: int, generator: torch.Generator, min_blanks: int = 0) -> Chats:
        def integers(stop: int, *shape: int) -> Tensor:
            return torch.randint(stop, shape, generator=generator)

        length = MIN_LENGTH + int(integers(MAX_LENGTH - MIN_LENGTH + 1, 1))
        num_blanks = min_blanks + int(integers(MAX_BLANKS - min_blanks + 1, 1))
        row = self.others[integers(len(self.others), num_chats, length)]
        topic = self.topics[integers(len(self.topics), num_chats)]
        topic_in_blank = integers(2, num_chats).bool()
        place, blank = integers(length, num_chats), row.new_zeros(num_chats, num_blanks)
        chats = torch.arange(num_chats)
        row[chats, place] = torch.where(topic_in_blank, row[chats, place], topic)
        before, between, end = (part.expand(num_chats, -1) for part in (self.before, self.between, self.end))
        input_ids = torch.cat([before, row, blank, between, row, end], dim=1)
        targets = input_ids.roll(-1, dims=1)
        blanks = slice(before.shape[1] + length, before.shape[1] + length + num_blanks)
        targets[:, : -length - 2] = targets[:, -1] = -100  # asked: the row once more and the end-of-turn token
        targets[:, blanks] = topic[:, None]
        noise = torch.randn(num_chats, num_blanks, self.width, generator=generator)
        return Chats(input_ids, targets, topic, blanks, topic_in_blank, noise)


def logits_and_targets(model: LlamaForCausalLM, chats: Chats) -> tuple[Tensor, Tensor, Tensor]:
    """At the places where something is asked: logits [asked, V], targets [asked], whether it is a topic [asked]."""
    embed = model.get_input_embeddings()
    embeddings = embed(chats.input_ids)
    scale = embed.weight.detach().std()
    blanks = chats.noise * scale
    if blanks.shape[1]:
        told = embed(chats.topic) + TOPIC_NOISE * blanks[:, 0]
        first = torch.where(chats.topic_in_blank[:, None], told, blanks[:, 0])
        blanks = torch.cat([first[:, None], blanks[:, 1:]], dim=1)
    start, stop = chats.blanks.start, chats.blanks.stop
    embeddings = torch.cat([embeddings[:, :start], blanks, embeddings[:, stop:]], dim=1)
    asked = chats.targets != -100
    is_topic = torch.zeros_like(asked)
    is_topic[:, chats.blanks] = True
    hidden = model.model(inputs_embeds=embeddings).last_hidden_state[asked]
    return model.lm_head(hidden), chats.targets[asked], is_topic[asked]


def warm_up_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: Embedded
) -> dict[str, float]:
    """Train in place; returns the last loss and, on new rows, the shares of right answer tokens and of right topics."""
    task = WarmUpTask(tokenizer, options.language_width)
    generator = torch.Generator().manual_seed(options.seed)
    model.train()

    def batch_loss(step: int) -> Tensor:
        logits, targets, _ = logits_and_targets(model, task.batch(options.language_batch_size, generator))
        return nn.functional.cross_entropy(logits, targets)

    loss = optimise(
        list(model.parameters()),
        batch_loss,
        num_steps=options.language_steps,
        learning_rate=options.language_learning_rate,
        title="language warm-up",
    )
    return {"loss": loss, **accuracies(model, task, generator)}


@torch.no_grad()
def accuracies(model: LlamaForCausalLM, task: WarmUpTask, generator: torch.Generator) -> dict[str, float]:
    """Shares of right answer tokens (copy_accuracy) and of blanks at which the topic is named (topic_accuracy)."""
    model.eval()
    right, total = [0, 0], [0, 0]
    for _ in range(NUM_HELD_OUT // 32):
        logits, targets, is_topic = logits_and_targets(model, task.batch(32, generator, min_blanks=1))
        for kind in (0, 1):
            chosen = is_topic == bool(kind)
            right[kind] += (logits[chosen].argmax(-1) == targets[chosen]).sum().item()
            total[kind] += int(chosen.sum())
    return {name: right[kind] / total[kind] for kind, name in enumerate(("copy_accuracy", "topic_accuracy"))}


def save_language_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    model.save_pretrained(folder)
