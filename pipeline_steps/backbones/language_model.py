"""A tiny Llama, warmed up on a copy task.

The user gives a random sequence of tokens and the assistant repeats it, in the chat format of all later stages. The
model learns induction heads: it can retrieve tokens from earlier in its context. Every answer about visual tokens needs
this ability, and a pretrained language model already has it.

Shapes: B chats, S tokens.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline_steps.common.device import choose_device

from .schema import Embedded
from .warm_up import optimise

MIN_LENGTH, MAX_LENGTH = 3, 10  # tokens in the sequence to copy
OUTPUT_GAIN = 0.4  # initial scale of the output projection relative to the value projection
NUM_HELD_OUT = 512  # chats with new sequences


def build_language_model(options: Embedded, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a randomly initialised Llama with tied embeddings and grouped-query attention.

    The output projection is initialised as the scaled transpose of the value projection, so that attention passes its
    input on (Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers"). Without this, learning to
    copy takes several times longer.
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


class CopyTask:
    """Random sequences of tokens to copy, in the chat format."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        def ids(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text))

        self.before = ids("<|im_start|>user\n")
        self.between = ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = ids("<|im_end|>")
        self.first_id = len(tokenizer.all_special_tokens)
        self.num_ids = len(tokenizer) - self.first_id

    def batch(self, num_chats: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """Return (input_ids [B, S], number of answer tokens at the end of each chat). All chats are equally long."""
        length = int(torch.randint(MIN_LENGTH, MAX_LENGTH + 1, (1,), generator=generator))
        row = self.first_id + torch.randint(self.num_ids, (num_chats, length), generator=generator)
        fixed = [part.expand(num_chats, -1) for part in (self.before, self.between, self.end)]
        return torch.cat([fixed[0], row, fixed[1], row, fixed[2]], dim=1), length + 1


def answer_logits(model: LlamaForCausalLM, input_ids: Tensor, num_answer: int) -> tuple[Tensor, Tensor]:
    """Return logits and ids of the last `num_answer` tokens: [B, num_answer, V], [B, num_answer]."""
    input_ids = input_ids.to(model.device)
    hidden = model.model(input_ids[:, :-1]).last_hidden_state[:, -num_answer:]
    return model.lm_head(hidden), input_ids[:, -num_answer:]


def warm_up_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: Embedded
) -> dict[str, float]:
    """Train in place. Returns {"copy_accuracy": token accuracy on held-out sequences, "loss": last loss}."""
    task = CopyTask(tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    model.to(choose_device(options.device, "backbones.embedded.device")).train()

    def batch_loss(step: int) -> Tensor:
        logits, labels = answer_logits(model, *task.batch(options.language_batch_size, generator))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    loss = optimise(
        list(model.parameters()),
        batch_loss,
        num_steps=options.language_steps,
        learning_rate=options.language_learning_rate,
        precision=options.precision,
        title="language warm-up",
    )
    accuracy = copy_accuracy(model, task, generator)
    model.to("cpu")
    return {"loss": loss, "copy_accuracy": accuracy}


@torch.no_grad()
def copy_accuracy(model: LlamaForCausalLM, task: CopyTask, generator: torch.Generator) -> float:
    """Return the token accuracy on NUM_HELD_OUT new sequences."""
    model.eval()
    right = total = 0
    for _ in range(NUM_HELD_OUT // 32):
        logits, labels = answer_logits(model, *task.batch(32, generator))
        right += (logits.argmax(-1) == labels).sum().item()
        total += labels.numel()
    return right / total


def save_language_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    model.save_pretrained(folder)
