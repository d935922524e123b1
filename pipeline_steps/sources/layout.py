"""Group the members of a WebDataset archive into samples.

The members of a sample share a key: their name up to the first dot after the last slash (WebDataset's rule). Frames of
a video may be numbered in four ways; this pipeline writes the first:

    {key}.000.jpg    {key}_000.jpg    {key}.frame_000.jpg or {key}_frame_000.jpg    {key}/000.jpg

If the number precedes the dot, the picture belongs to `{key}`, unless it has a .json or .txt of its own.

Every member is part of a sample, the reason why a sample is unusable, or counted as unreferenced with a reason. A name
with further dots, such as v1.5_clip.mp4, is the field `5_clip.mp4` of the key `v1`. It is never taken for the video of
`v1`, or of `v1.5_clip`: the sample is unusable if it has no other medium (or text).
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline_steps.sources.archive import Member
from pipeline_steps.sources.folder import IMAGE_SUFFIXES, VIDEO_SUFFIXES

NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
NUMBERED_SUFFIX = re.compile(r"(?:frames?[_-]?)?(\d{1,6})(\.[a-z]+)", re.ASCII)
NUMBERED_KEY = re.compile(r"(.+?)((?:[_/-]frames?)?)[_/-](?:frames?[_-]?)?(\d{3,6})", re.DOTALL | re.ASCII)

# Why a member belongs to no sample.
NO_DOT, HIDDEN = "no dot in its name", "hidden"
UNKNOWN_TYPE, OTHER_FIELD = "not a picture, video, .json or .txt", "a further field of a sample"


@dataclass(slots=True)
class Group:
    """The members of one sample."""

    key: str
    json: Member | None = None
    text: Member | None = None
    still: Member | None = None
    video: Member | None = None
    pictures: list[tuple[int, Member]] = field(default_factory=list)  # (number, picture), in the archive's order
    fields: list[tuple[str, str, Member]] = field(default_factory=list)  # ("media" or "text", field name, member) of
    # names with further dots
    problem: str | None = None  # why the sample is unusable

    def complain(self, problem: str) -> None:
        self.problem = self.problem or problem

    def has(self, what: str) -> bool:
        """Whether there is "media", or "text"."""
        return bool(self.still or self.video or self.pictures if what == "media" else self.json or self.text)

    def is_sample(self) -> bool:
        return bool(self.json or self.text or self.still or self.video or self.pictures or self.problem)


class Layout:
    """Sorts members into groups.

    `unreferenced` lists the first `max_names` members that belong to no sample, `reasons` counts all of them by reason.
    """

    def __init__(self, max_names: int):
        self.groups: dict[str, Group] = {}
        self.unreferenced, self.reasons, self._max_names = [], Counter(), max_names
        self.last: Group | None = None  # group of the last added member

    def add(self, member: Member) -> None:
        name = member.name.removeprefix("./")
        parts = NAME.fullmatch(name)
        if parts is None:
            self._leave(name, NO_DOT if "." not in PurePosixPath(name).name else HIDDEN)
        elif not self._place(parts[1], parts[2].lower(), member):
            self._leave(name, UNKNOWN_TYPE)

    def samples(self) -> Iterable[Group]:
        """Move numbered pictures to their sample, then return all samples in the order of their first member."""
        for group in list(self.groups.values()):
            self._settle_fields(group)
            alone = group.still and not (group.json or group.text or group.video or group.pictures)
            numbered = NUMBERED_KEY.fullmatch(group.key) if alone else None
            if numbered is not None:
                self._move(group, numbered)
        return [group for group in self.groups.values() if group.is_sample()]

    def _place(self, key: str, suffix: str, member: Member) -> bool:
        """Add the member to its group. Returns False if samples have no members of this type."""
        numbered = NUMBERED_SUFFIX.fullmatch(suffix)
        last = "." + suffix.rpartition(".")[2]
        kind = {".json": "json", ".txt": "text"}.get(last)
        kind = "still" if last in IMAGE_SUFFIXES else "video" if last in VIDEO_SUFFIXES else kind
        numbered = numbered if numbered and numbered[2] in IMAGE_SUFFIXES else None
        if kind is None and numbered is None:
            return False
        group = self.last = self.groups.setdefault(key, Group(key))
        if member.problem:
            group.complain(f"{quoted(member.name)}: {member.problem}")
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            group.complain(f"the name {quoted(member.name)} points outside of the archive")
        if numbered is not None:
            group.pictures.append((int(numbered[1]), member))
        elif last != f".{suffix}":
            group.fields.append(("media" if kind in ("still", "video") else "text", suffix, member))
        elif getattr(group, kind) is None:
            setattr(group, kind, member)
        else:
            group.complain(f"found both {quoted(getattr(group, kind).name)} and {quoted(member.name)}")
        return True

    def _settle_fields(self, group: Group) -> None:
        """Count the fields with further dots of a group that has its medium (or text); else complain about them."""
        for what, name, member in group.fields:
            if group.has(what):
                self._leave(member.name.removeprefix("./"), OTHER_FIELD)
            else:
                group.complain(
                    f"{quoted(member.name)}: its key is the name up to the first dot: {quoted(group.key)}, and the "
                    f"field {quoted(name)} is unknown. Rename it without further dots"
                )

    def _move(self, group: Group, numbered: re.Match) -> None:
        """Move the picture of `group` to the sample named by its key without the number."""
        candidates = [numbered[1] + numbered[2], numbered[1]]
        described = [key for key in candidates if key in self.groups and self._is_described(self.groups[key])]
        base = (described or candidates[-1:])[0]  # pictures without a .json count as one unusable sample
        target = self.groups.setdefault(base, Group(base))
        target.pictures.append((int(numbered[3]), group.still))
        target.problem = target.problem or group.problem
        if self.last is group:
            self.last = target
        del self.groups[group.key]

    @staticmethod
    def _is_described(group: Group) -> bool:
        return bool(group.json or group.text)

    def _leave(self, name: str, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.unreferenced) < self._max_names:
            self.unreferenced.append(printable(name))


def printable(text: str) -> str:
    """Return at most 200 characters of `text`, with unprintable ones escaped, for lists and messages."""
    shown = text[:200] + ("..." if len(text) > 200 else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)


def quoted(text: str) -> str:
    return f"'{printable(text)}'"
