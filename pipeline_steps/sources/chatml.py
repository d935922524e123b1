"""Token ids of a ChatML chat, `<|im_start|>role\\ncontent<|im_end|>\\n` ..., back to its messages.

Old shards hold token ids and a loss mask in place of text. They are turned back into text, so that prompts, lengths and
masks are those of the present run, whatever was stored.
"""

from functools import cache
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer

from pipeline_steps.common.errors import UserError

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


class NotChatML(Exception):
    """Ids that are no whole chat of this tokenizer; the text says why."""


class ChatMLDecoder:
    """Decodes with the tokenizer in `folder`, which must be the one that made the ids (this is checked)."""

    def __init__(self, folder: str | Path):
        path = Path(folder).expanduser() / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: missing. `tokenizer` names the folder of the tokenizer that made the token_ids.")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.start, self.end = (self.tokenizer.token_to_id(token) for token in (TURN_START, TURN_END))
        if self.start is None or self.end is None:
            raise UserError(f"{path}: no {TURN_START} and {TURN_END}: its token ids cannot be read as ChatML.")
        self.special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.default_system = _default_system(path.parent)

    def messages(self, ids: list[int]) -> list[tuple[str, str]]:
        """[(role, content)]; the system line that the chat template adds by itself is left out. Raises NotChatML."""
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
        """(role, content, place of the end-of-turn token) of the turn whose text begins at `first`."""
        last = first
        while last < len(ids) and ids[last] not in (self.start, self.end):
            last += 1
        if last == len(ids) or ids[last] == self.start:
            raise NotChatML(f"the turn at token {first} is cut off: no {TURN_END}")
        text = self.tokenizer.decode(ids[first:last], skip_special_tokens=False)
        role, line_break, content = text.partition("\n")
        if role not in ROLES or not line_break:
            raise NotChatML(f"the turn at token {first} begins with {text[:20]!r}, not with a role")
        if self.tokenizer.encode(text, add_special_tokens=False).ids != ids[first:last]:
            raise NotChatML(f"the turn at token {first} is none of this tokenizer: its text gives other token ids")
        return role, content, last

    def _skip(self, ids: list[int], place: int) -> int:
        """The next turn's place: line breaks and padding are passed over."""
        while place < len(ids) and ids[place] != self.start:
            if ids[place] not in self.special and self.tokenizer.decode([ids[place]]).strip():
                raise NotChatML(f"token {place} is text between two turns")
            place += 1
        return place


@cache
def decoder(folder: str) -> ChatMLDecoder:
    """One per process and folder."""
    return ChatMLDecoder(folder)


def _default_system(folder: Path) -> str | None:
    """The system line that the tokenizer's chat template puts before a chat that has none, if it does."""
    from transformers import PreTrainedTokenizerFast  # takes seconds, and is not needed for other archives

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateError as error:
        raise UserError(f"{folder}: its chat template refuses a question: {error}") from None
    before = text.partition(f"{TURN_START}user\n")[0].removeprefix(f"{TURN_START}system\n")
    return before.removesuffix("\n").removesuffix(TURN_END) if TURN_END in before else None
