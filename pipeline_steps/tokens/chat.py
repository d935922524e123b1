"""Render items as chats and tokenise them with masks. The text is checked against the tokenizer's chat template.

The whole chat is tokenised at once; the tokenizer's offsets map tokens to parts of the text. The ids therefore equal
those of `apply_chat_template` without the line break after the last end-of-turn token.
"""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from pipeline_steps.common import choices
from pipeline_steps.common.errors import UserError

PROBE = "\N{REPLACEMENT CHARACTER}"


class Answer(NamedTuple):
    """Character offsets of one assistant message in a chat's text."""

    start: int
    scored_start: int  # after the cue
    end: int
    turn_end: int  # end of the end-of-turn token


@dataclass
class Chat:
    """The text of one chat and the character spans in it."""

    text: str = ""
    question_end: int = 0  # end of the first user message, before its end-of-turn token
    answers: list[Answer] = field(default_factory=list)  # the answers that are trained on


class Encoded(NamedTuple):
    """One tokenised chat. The lists have one entry per token, except `answers`."""

    input_ids: list[int]
    visual_position: int
    answer_mask: list[bool]
    score_mask: list[bool]
    answers: list[tuple[int, int]]  # token span (start, stop) of every answer, including its end-of-turn token


class ChatRenderer:
    """Renders items with the tokenizer's chat template and records where every message begins and ends.

    `section`: the parameters of the stage, which hold the prompts of every source.
    """

    def __init__(self, tokenizer, section):
        self.tokenizer, self.section = tokenizer, section
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        control_tokens = sorted({*tokenizer.all_special_tokens, *special})
        self.control_token = re.compile("|".join(map(re.escape, control_tokens)))  # texts must not contain these
        self._prompts = {}  # source -> Prompt
        self._frames = {}  # (first message?, role) -> (text before the content, text after it)

    def messages(self, sample, item):
        """Return the item's stripped (role, content) pairs, system first. Raises UserError for blank text."""
        if sample.source not in self._prompts:
            self._prompts[sample.source] = self.section.prompt(sample.source)
        prompt, where = self._prompts[sample.source], f"sample '{sample.key}'"
        if item.messages is not None:
            messages = [(message.role, message.content) for message in item.messages]
        elif item.options is not None:
            user = choices.question(_stripped(item.user, "user", where), item.options, prompt.choice, where)
            messages = [("user", user), ("assistant", choices.answer(item.correct_option))]
        else:
            messages = [("user", _user_line(sample, item, prompt)), ("assistant", item.assistant)]
        messages = [(role, _stripped(content, role, where)) for role, content in messages]
        roles = [role for role, _ in messages if role != "system"]
        if roles[:1] != ["user"] or roles[-1] != "assistant":
            raise UserError(
                f"{where}: a chat must start with a user message and end with an assistant message, found "
                f"{', '.join(roles)}"
            )
        if prompt.system.strip() and messages[0][0] != "system":
            messages.insert(0, ("system", prompt.system.strip()))
        return messages

    def rejected(self, sample, item, messages):
        """`messages` with the item's rejected answer as the last message, or None without a rejected answer."""
        if item.rejected is None:
            return None
        return [*messages[:-1], ("assistant", _stripped(item.rejected, "rejected assistant", f"sample '{sample.key}'"))]

    def render(self, messages, cue="", last_only=False):
        """Render messages as a Chat. last_only: train on the last answer only."""
        return self.render_all([(messages, cue, last_only)])[0]

    def render_all(self, jobs):
        """Render one Chat per tuple of arguments of `render`. Raises UserError if the template changes the messages."""
        if not jobs:
            return []
        found = self._templates([messages for messages, _, _ in jobs])
        chats = [self._chat(*job) for job in jobs]
        for chat, text in zip(chats, found, strict=True):
            if chat.text != text:
                raise UserError(
                    "the tokenizer's chat template reorders or changes messages; it renders "
                    f"{text!r}. Use a tokenizer whose template concatenates the messages unchanged."
                )
            chat.text = text[: chat.answers[-1].turn_end]
        return chats

    def _chat(self, messages, cue, last_only):
        chat, pieces, length = Chat(), [], 0
        for number, (role, content) in enumerate(messages):
            before, after = self._frame(number == 0, role)
            start = length + len(before)
            end = start + len(content)
            length = end + len(after)
            pieces += before, content, after
            if role == "user" and not chat.question_end:
                chat.question_end = end
            if role == "assistant":
                turn_end = end + after.index(self.tokenizer.eos_token) + len(self.tokenizer.eos_token)
                chat.answers.append(Answer(start, start + len(cue.lstrip()), end, turn_end))
        chat.text = "".join(pieces)
        if last_only:
            del chat.answers[:-1]
        return chat

    def _frame(self, first, role):
        if (first, role) not in self._frames:
            lead = [] if first else [("user", PROBE), ("assistant", PROBE)][: 1 if role == "assistant" else 2]
            text = self._template([*lead, (role, PROBE)])[len(self._template(lead)) if lead else 0 :]
            before, _, after = text.partition(PROBE)
            if role == "assistant" and self.tokenizer.eos_token not in after:
                raise UserError(
                    f"the tokenizer's chat template ends an answer with {after!r}, without the end-of-turn token "
                    f"{self.tokenizer.eos_token!r} (eos_token), so the model would not learn to stop. "
                    "Correct the template."
                )
            self._frames[first, role] = before, after
        return self._frames[first, role]

    def _template(self, messages):
        return self._templates([messages])[0]

    def _templates(self, chats):
        named = [[{"role": role, "content": content} for role, content in messages] for messages in chats]
        try:
            return self.tokenizer.apply_chat_template(named, tokenize=False)
        except TemplateError as error:
            if len(chats) > 1:
                return [self._template(messages) for messages in chats]  # one by one, to find the failing chat
            raise UserError(
                f"the tokenizer's chat template rejects the roles {[role for role, _ in chats[0]]}: {error}. "
                "Use another tokenizer, or correct the chats."
            ) from None


def _user_line(sample, item, prompt):
    if item.user is not None:
        return item.user
    if sample.kind == "text":
        raise UserError(f"sample '{sample.key}': a text-only item needs 'user' or 'messages'. Add one.")
    return prompt.image if sample.kind == "image" else prompt.video


def _stripped(content, role, where):
    content = content.strip()
    if not content:
        raise UserError(f"{where}: the {role} message is empty. Correct or remove it at its source.")
    return content


def load_tokenizer(folder):
    """Load the tokenizer of a language model from its tokenizer.json. Raises UserError if it is unusable."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder / 'tokenizer.json'}: missing. Run `dvc repro backbones`, which writes it. A custom "
            "tokenizer needs the fast format (tokenizer.json) and a chat template."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template (in tokenizer_config.json or chat_template.jinja). Add one."
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos_token (in tokenizer_config.json), the token that ends answers. Set it."
        )
    return tokenizer


def tokenize(tokenizer, chats):
    """Tokenise the chats. Returns one Encoded per Chat."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # tokenizer.json may enable either
    backend.no_padding()
    found = backend.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    return [_encoded(chat, encoding.ids, encoding.offsets) for chat, encoding in zip(chats, found, strict=True)]


def _encoded(chat, input_ids, offsets):
    """Map character spans to tokens. A token belongs to an answer if any of its characters does.

    Starts and ends of tokens never decrease, so binary search works on both.
    """
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    answer_mask, spans, scored = [False] * len(offsets), [], bytearray(len(chat.text))
    for answer in chat.answers:
        first, stop = bisect_right(ends, answer.start), bisect_left(starts, answer.turn_end)
        answer_mask[first:stop] = [True] * (stop - first)
        spans.append((first, stop))
        words = chat.text[answer.scored_start : answer.end]
        scored[answer.scored_start : answer.end] = bytes(map(str.isalnum, words))
    before = list(accumulate(scored, initial=0))  # number of scored characters before each offset
    score_mask = [before[end] > before[start] for start, end in offsets]
    return Encoded(input_ids, bisect_left(starts, chat.question_end), answer_mask, score_mask, spans)
