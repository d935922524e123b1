"""From items to token ids with masks: one rendering, checked against the tokenizer's own chat template.

Offsets of the tokenizer say which token belongs to which part of the text, so the whole chat is tokenised at once and
the ids are those of `apply_chat_template`, less the line break after the last end-of-turn token.
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
    """Characters of one assistant line in a chat's text."""

    start: int
    scored_start: int  # after the cue
    end: int
    turn_end: int  # end of the end-of-turn token


@dataclass
class Chat:
    """The text of one chat and the character spans in it."""

    text: str = ""
    question_end: int = 0  # end of the first user line, before its end-of-turn token
    answers: list[Answer] = field(default_factory=list)  # what is learned


class Encoded(NamedTuple):
    """One chat's tokens; lists over them."""

    input_ids: list[int]
    visual_position: int
    answer_mask: list[bool]
    score_mask: list[bool]
    answers: list[tuple[int, int]]  # (start, stop) of every answer with its end-of-turn token


class ChatRenderer:
    """Puts items into the tokenizer's chat template and knows where every message begins and ends.

    `section`: the parameters of the stage, for their table of prompts.
    """

    def __init__(self, tokenizer, section):
        self.tokenizer, self.section = tokenizer, section
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        control_tokens = sorted({*tokenizer.all_special_tokens, *special})
        self.control_token = re.compile("|".join(map(re.escape, control_tokens)))  # none of them is ordinary text
        self._prompts = {}  # source -> Prompt
        self._frames = {}  # (first message?, role) -> (text before the content, text after it)

    def messages(self, sample, item):
        """The item's (role, content) pairs with stripped contents, the system line first. UserError for a blank one."""
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
            raise UserError(f"{where}: a chat goes from user to assistant, found {', '.join(roles)}")
        if prompt.system.strip() and messages[0][0] != "system":
            messages.insert(0, ("system", prompt.system.strip()))
        return messages

    def rejected(self, sample, item, messages):
        """`messages` with the rejected answer of a preference in place of the last one; None if there is none."""
        if item.rejected is None:
            return None
        return [*messages[:-1], ("assistant", _stripped(item.rejected, "rejected assistant", f"sample '{sample.key}'"))]

    def render(self, messages, cue="", last_only=False):
        """The Chat of these messages. last_only: of the answers, the last one alone is learned."""
        return self.render_all([(messages, cue, last_only)])[0]

    def render_all(self, jobs):
        """One Chat for the arguments of `render` in each of `jobs`. UserError if the template changes the messages."""
        if not jobs:
            return []
        found = self._templates([messages for messages, _, _ in jobs])
        chats = [self._chat(*job) for job in jobs]
        for chat, text in zip(chats, found, strict=True):
            if chat.text != text:
                raise UserError(
                    "the tokenizer's chat template does not put every message after the one before, unchanged "
                    f"(it gives {text!r}): such a template cannot be trained with here"
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
                    f"{self.tokenizer.eos_token!r} (eos_token), so no model would learn to stop."
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
                return [self._template(messages) for messages in chats]  # names the one that is refused
            raise UserError(
                f"the tokenizer's chat template refuses {[role for role, _ in chats[0]]}: {error}"
            ) from None


def _user_line(sample, item, prompt):
    if item.user is not None:
        return item.user
    if sample.kind == "text":
        raise UserError(f"sample '{sample.key}': a text-only item needs 'user' or 'messages'")
    return prompt.image if sample.kind == "image" else prompt.video


def _stripped(content, role, where):
    content = content.strip()
    if not content:
        raise UserError(f"{where}: the {role}'s text is empty, no tokens. Correct or remove it at its source.")
    return content


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
    if tokenizer.eos_token is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos_token (in tokenizer_config.json): the one that ends answers"
        )
    return tokenizer


def tokenize(tokenizer, chats):
    """One Encoded per Chat."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may ask for either
    backend.no_padding()
    found = backend.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    return [_encoded(chat, encoding.ids, encoding.offsets) for chat, encoding in zip(chats, found, strict=True)]


def _encoded(chat, input_ids, offsets):
    """A token belongs to an answer when one of its characters does: both ends of tokens never go back in the text."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    answer_mask, spans, scored = [False] * len(offsets), [], bytearray(len(chat.text))
    for answer in chat.answers:
        first, stop = bisect_right(ends, answer.start), bisect_left(starts, answer.turn_end)
        answer_mask[first:stop] = [True] * (stop - first)
        spans.append((first, stop))
        words = chat.text[answer.scored_start : answer.end]
        scored[answer.scored_start : answer.end] = bytes(map(str.isalnum, words))
    before = list(accumulate(scored, initial=0))  # scored characters before each place in the text
    score_mask = [before[end] > before[start] for start, end in offsets]
    return Encoded(input_ids, bisect_left(starts, chat.question_end), answer_mask, score_mask, spans)
