"""From items to token ids with masks: one rendering, checked against the tokenizer's own chat template.

Offsets of the tokenizer say which token belongs to which part of the text, so the whole chat is tokenised at once and
the ids are those of `apply_chat_template`, less the line break after the last end-of-turn token.
"""

from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from pipeline_steps.params import UserError

PROBE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Chat:
    """The text of one item and the character spans in it."""

    text: str = ""
    question_end: int = 0  # end of the first user line, before its end-of-turn token
    answers: list = field(default_factory=list)  # (start, end, end with end-of-turn token) of every assistant line
    cue_end: int = 0  # tokens up to here name the cue and are not scored


class ChatRenderer:
    """Puts messages into the tokenizer's chat template and knows where every message begins and ends."""

    def __init__(self, tokenizer, system, prompts):
        self.tokenizer, self.system, self.prompts = tokenizer, system, prompts
        self.control_tokens = tuple(tokenizer.all_special_tokens)
        self._frames = {}  # (first message?, role) -> (text before the content, text after it)

    def messages(self, sample, item):
        """The item's messages with stripped contents, the system line first. UserError for a blank line."""
        if item.messages is None:
            user = item.user
            if user is None:
                if sample.kind == "text":
                    raise UserError(f"sample '{sample.key}': a text-only item needs 'user' or 'messages'")
                user = self.prompts.image if sample.kind == "image" else self.prompts.default
            messages = [("user", user), ("assistant", item.assistant)]
        else:
            messages = [(message.role, message.content) for message in item.messages]
        messages = [(role, content.strip()) for role, content in messages]
        for role, content in messages:
            if not content:
                raise UserError(
                    f"sample '{sample.key}': the {role}'s text is empty, no tokens. Correct or remove it at its source."
                )
        roles = [role for role, _ in messages if role != "system"]
        if roles[:1] != ["user"] or roles[-1] != "assistant":
            raise UserError(f"sample '{sample.key}': a chat goes from user to assistant, found {', '.join(roles)}")
        if self.system and messages[0][0] != "system":
            messages.insert(0, ("system", self.system))
        return messages

    def render(self, messages, cue=""):
        """The Chat of these messages."""
        chat = Chat()
        for number, (role, content) in enumerate(messages):
            before, after = self._frame(number == 0, role)
            start = len(chat.text) + len(before)
            end = start + len(content)
            chat.text += before + content + after
            if role == "user" and not chat.question_end:
                chat.question_end = end
            if role == "assistant":
                chat.answers.append((start, end, end + len(after.rstrip("\n"))))
                chat.cue_end = start + len(cue)
        if chat.text != self._template(messages):
            raise UserError(
                "the tokenizer's chat template does not put every message after the one before, unchanged "
                f"(it gives {self._template(messages)!r}): such a template cannot be trained with here"
            )
        chat.text = chat.text[: chat.answers[-1][2]]
        return chat

    def _frame(self, first, role):
        if (first, role) not in self._frames:
            lead = [] if first else [("user", PROBE), ("assistant", PROBE)][: 1 if role == "assistant" else 2]
            text = self._template([*lead, (role, PROBE)])[len(self._template(lead)) if lead else 0 :]
            before, _, after = text.partition(PROBE)
            self._frames[first, role] = before, after
        return self._frames[first, role]

    def _template(self, messages):
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses {[role for role, _ in messages]}: {error}"
            ) from None


def load_tokenizer(folder):
    """The tokenizer of a language model's folder, exactly as its tokenizer.json says. UserError if unusable."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder / 'tokenizer.json'}: missing. `python -m pipeline_steps.backbones` writes it; a tokenizer of "
            "your own needs the fast format (tokenizer.json) and a chat template."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template (in tokenizer_config.json or chat_template.jinja)"
        )
    return tokenizer


def tokenize(tokenizer, chats):
    """One dict per Chat: input_ids, visual_position, answer_mask, score_mask (lists over the text's tokens)."""
    if not chats:
        return []
    encoded = tokenizer(
        [chat.text for chat in chats],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = zip(chats, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [{"input_ids": ids, **_masks(chat, offsets)} for chat, ids, offsets in pairs]


def _masks(chat, offsets):
    answer_mask, score_mask = [False] * len(offsets), [False] * len(offsets)
    for start, end, turn_end in chat.answers:
        for i, (token_start, token_end) in enumerate(offsets):
            if start <= token_start and token_end <= turn_end:
                answer_mask[i] = True
                scored = chat.text[
                    max(token_start, chat.cue_end if len(chat.answers) == 1 else 0) : min(token_end, end)
                ]
                score_mask[i] = any(character.isalnum() for character in scored)
    visual_position = next(i for i, (token_start, _) in enumerate(offsets) if token_start >= chat.question_end)
    return {"visual_position": visual_position, "answer_mask": answer_mask, "score_mask": score_mask}
