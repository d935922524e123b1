"""Turn packed samples into sidecar rows. Chats that are too long are truncated or dropped, with a reason."""

from dataclasses import dataclass, field

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import Dropped, Item, PackedSample
from pipeline_steps.tokens.chat import Encoded, tokenize


@dataclass
class Outcome:
    """Rows, dropped items and truncated items of a list of samples."""

    rows: list[dict] = field(default_factory=list)  # of sidecar.SCHEMA, without the offsets in the tar
    dropped: list[Dropped] = field(default_factory=list)
    truncated: list[Dropped] = field(default_factory=list)  # kept, but without their last turns


@dataclass
class Draft:
    """An item in progress: its messages, tokens, and why it is dropped or truncated."""

    sample: PackedSample
    number: int  # of the item within the sample
    item: Item
    messages: list[tuple[str, str]]  # (role, content)
    rejected: list[tuple[str, str]] | None
    reason: str | None = None  # why it is dropped; None: it is kept
    encoded: Encoded | None = None
    rejected_encoded: Encoded | None = None
    truncated_turns: int = 0
    truncation: str | None = None  # numbers of tokens and turns, if truncated

    def check_texts(self, control_token):
        """Set `reason` if a text contains a control token or both answers are equal."""
        contents = [content for _, content in self.messages + (self.rejected or [])[-1:]]
        if any(map(control_token.search, contents)):
            self.reason = "control token in the text"
        elif self.rejected == self.messages:
            self.reason = "the chosen and the rejected answer are the same"

    def shorten(self, max_tokens):
        """Drop as few turns at the end as possible to fit max_tokens. Returns whether to encode the chat again."""
        length, ends = len(self.encoded.input_ids), [stop for _, stop in self.encoded.answers]
        num_kept = sum(stop <= max_tokens for stop in ends)
        if length <= max_tokens or self.rejected is not None or num_kept == 0:
            return False
        self.truncated_turns = len(ends) - num_kept
        self.truncation = f"{length} tokens in {len(ends)} turns, max_tokens is {max_tokens}: {num_kept} turns kept"
        places = [place for place, (role, _) in enumerate(self.messages) if role == "assistant"]
        self.messages = self.messages[: places[num_kept - 1] + 1]
        return True

    def check_length(self, max_tokens):
        """Set `reason` if the chat is still longer than max_tokens."""
        length, where = max(len(side.input_ids) for side in (self.encoded, self.rejected_encoded) if side), ""
        first_turn = self.encoded.answers[0][1]
        if len(self.encoded.answers) > 1 and first_turn > max_tokens:
            length, where = first_turn, " in the first turn"
        if length > max_tokens:
            self.reason = f"{length} tokens{where}, max_tokens is {max_tokens}"

    def entry(self, reason):
        """Return the item's entry for the lists of dropped and truncated items."""
        return Dropped(key=self.sample.key, item=self.number, reason=reason)

    def row(self):
        """Return the row of sidecar.SCHEMA without tar offsets. Raises UserError for an answer without tokens."""
        sample, encoded = self.sample, self.encoded
        for side, text in ((encoded, self.messages), (self.rejected_encoded, self.rejected)):
            if side and any(stop - start < 2 for start, stop in side.answers):  # only the end-of-turn token
                answers = ", ".join(repr(content) for role, content in text if role == "assistant")
                raise UserError(f"sample '{sample.key}': the answer {answers} has no tokens. Correct or remove it.")
        return {
            "key": sample.key,
            "item": self.number,
            "source": sample.source,
            "task": self.item.task,
            "kind": sample.kind,
            "num_frames": sample.frame_count,
            "frame_times": sample.timestamps,
            "input_ids": encoded.input_ids,
            "visual_position": encoded.visual_position,
            "answer_mask": encoded.answer_mask,
            "score_mask": encoded.score_mask,
            "rejected_ids": self.rejected_encoded and self.rejected_encoded.input_ids,
            "rejected_mask": self.rejected_encoded and self.rejected_encoded.answer_mask,
            "truncated_turns": self.truncated_turns,
            "answer": self.messages[-1][1],
            "cue": self.item.cue,
            "target": self.item.target,
        }


def tokenize_samples(samples, renderer, max_tokens):
    """Return the Outcome of all items, in order. Raises UserError for an item without answer text."""
    drafts = []
    for sample in samples:
        for number, item in enumerate(sample.items):
            messages = renderer.messages(sample, item)
            drafts.append(Draft(sample, number, item, messages, renderer.rejected(sample, item, messages)))
            drafts[-1].check_texts(renderer.control_token)
    usable = [draft for draft in drafts if draft.reason is None]
    _encode(usable, renderer)
    _encode([draft for draft in usable if draft.shorten(max_tokens)], renderer)
    outcome = Outcome()
    for draft in drafts:
        if draft.encoded is not None:
            draft.check_length(max_tokens)
        if draft.reason is not None:
            outcome.dropped.append(draft.entry(draft.reason))
            continue
        outcome.rows.append(draft.row())
        if draft.truncated_turns:
            outcome.truncated.append(draft.entry(draft.truncation))
    return outcome


def _encode(drafts, renderer):
    """Render and tokenise the drafts, both sides of preferences.

    Both sides train on the last answer only; otherwise earlier turns would count for the chosen side alone.
    """
    jobs = [(draft.messages, draft.item.cue, draft.rejected is not None) for draft in drafts]
    for draft, encoded in zip(drafts, tokenize(renderer.tokenizer, renderer.render_all(jobs)), strict=True):
        draft.encoded = encoded
    pairs = [draft for draft in drafts if draft.rejected is not None]
    chats = renderer.render_all([(draft.rejected, "", True) for draft in pairs])
    for draft, encoded in zip(pairs, tokenize(renderer.tokenizer, chats), strict=True):
        draft.rejected_encoded = encoded
