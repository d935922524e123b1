"""Decode the token ids of a ChatML chat, `<|im_start|>role\\ncontent<|im_end|>\\n` ..., into messages.

Some older shards store token ids and a loss mask instead of text. Decoding them lets the current run apply its own
prompts, length limits and masks.
"""

from functools import cache
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer

from pipeline_steps.common.errors import UserError

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


class NotChatML(Exception):
    """The ids are not a complete chat of this tokenizer. The message says why."""


class ChatMLDecoder:
    """Decodes token ids with the tokenizer in `folder`.

    It must be the tokenizer that produced the ids; `messages` verifies this by encoding the text again.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder).expanduser() / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path}: missing. Set `tokenizer` to the folder of the tokenizer that produced the token_ids."
            )
        self.tokenizer = Tokenizer.from_file(str(path))
        self.start, self.end = (self.tokenizer.token_to_id(token) for token in (TURN_START, TURN_END))
        if self.start is None or self.end is None:
            raise UserError(
                f"{path}: no {TURN_START} or no {TURN_END}, so its token ids are not ChatML. Use a ChatML tokenizer."
            )
        self.special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.default_system = _default_system(path.parent)

    def messages(self, ids: list[int]) -> list[tuple[str, str]]:
        """Return [(role, content)] without the default system message of the chat template. Raises NotChatML."""
        for number in ids:
            if number < 0 or self.tokenizer.id_to_token(number) is None:
                raise NotChatML(f"token id {number} is not in the tokenizer's vocabulary")
        messages, place = [], 0
        while place < len(ids) and ids[place] == self.start:
            role, content, place = self._turn(ids, place + 1)
            messages.append((role, content))
            place = self._skip(ids, place)
        if place < len(ids) or not messages:
            raise NotChatML(f"token {place} is not {TURN_START}")
        if self.default_system is not None and messages[0] == ("system", self.default_system):
            del messages[0]
        return messages

    def _turn(self, ids: list[int], first: int) -> tuple[str, str, int]:
        """Return (role, content, index of the end-of-turn token) of the turn whose text starts at `first`."""
        last = first
        while last < len(ids) and ids[last] not in (self.start, self.end):
            last += 1
        if last == len(ids) or ids[last] == self.start:
            raise NotChatML(f"the turn at token {first} is cut off: no {TURN_END}")
        text = self.tokenizer.decode(ids[first:last], skip_special_tokens=False)
        role, line_break, content = text.partition("\n")
        if role not in ROLES or not line_break:
            raise NotChatML(f"the turn at token {first} starts with {text[:20]!r}, expected a role")
        if self.tokenizer.encode(text, add_special_tokens=False).ids != ids[first:last]:
            raise NotChatML(
                f"the turn at token {first} was encoded by another tokenizer: its text encodes to other ids"
            )
        return role, content, last

    def _skip(self, ids: list[int], place: int) -> int:
        """Return the index of the next turn, skipping line breaks and padding."""
        while place < len(ids) and ids[place] != self.start:
            if ids[place] not in self.special and self.tokenizer.decode([ids[place]]).strip():
                raise NotChatML(f"token {place} is text between two turns")
            place += 1
        return place


@cache
def decoder(folder: str) -> ChatMLDecoder:
    """Return the ChatMLDecoder of a folder, cached per process."""
    return ChatMLDecoder(folder)


def _default_system(folder: Path) -> str | None:
    """Return the system message that the chat template adds to a chat without one, or None."""
    from transformers import PreTrainedTokenizerFast  # slow to import, needed only for archives of token ids

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateError as error:
        raise UserError(f"{folder}: the chat template rejects a single user message: {error}") from None
    before = text.partition(f"{TURN_START}user\n")[0].removeprefix(f"{TURN_START}system\n")
    return before.removesuffix("\n").removesuffix(TURN_END) if TURN_END in before else None
