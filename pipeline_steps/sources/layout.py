"""Which members of a WebDataset archive make up one sample.

A sample's members share a key: their name up to the first dot after the last slash (WebDataset's rule). Pictures of a
video are numbered in one of four ways, of which the first is written today:

    {key}.000.jpg    {key}_000.jpg    {key}.frame_000.jpg or {key}_frame_000.jpg    {key}/000.jpg

Where the number is part of the name before the dot, the picture belongs to `{key}` if it has no .json or .txt itself.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline_steps.sources.archive import Member
from pipeline_steps.sources.folder import IMAGE_SUFFIXES, VIDEO_SUFFIXES

NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
NUMBERED_SUFFIX = re.compile(r"(?:frames?[_-]?)?(\d{1,6})(\.[a-z]+)", re.ASCII)
NUMBERED_KEY = re.compile(r"(.+?)((?:[_/-]frames?)?)[_/-](?:frames?[_-]?)?(\d{3,6})", re.DOTALL | re.ASCII)


@dataclass(slots=True)
class Group:
    """The members of one sample."""

    key: str
    json: Member | None = None
    text: Member | None = None
    still: Member | None = None
    video: Member | None = None
    pictures: list[tuple[int, Member]] = field(default_factory=list)  # number and picture, in the archive's order
    problem: str | None = None  # why this is no sample

    def complain(self, problem: str) -> None:
        self.problem = self.problem or problem

    def is_sample(self) -> bool:
        return bool(self.json or self.text or self.still or self.video or self.pictures or self.problem)


class Layout:
    """Sorts members into groups. `others`: number of members that belong to no sample, and the first names."""

    def __init__(self, max_names: int):
        self.groups: dict[str, Group] = {}
        self.num_others, self.others, self._max_names = 0, [], max_names
        self.last: Group | None = None  # of the member that was added last

    def add(self, member: Member) -> None:
        name = member.name.removeprefix("./")
        parts = NAME.fullmatch(name)
        if parts is None or not self._place(parts[1], parts[2].lower(), member):
            self._leave(name)

    def samples(self) -> Iterable[Group]:
        """All groups, in the order of their first member, once numbered pictures are with their sample."""
        for group in list(self.groups.values()):
            alone = group.still and not (group.json or group.text or group.video or group.pictures)
            numbered = NUMBERED_KEY.fullmatch(group.key) if alone else None
            if numbered is not None:
                self._move(group, numbered)
        return [group for group in self.groups.values() if group.is_sample()]

    def _place(self, key: str, suffix: str, member: Member) -> bool:
        """Puts the member into its group; False for a kind of member that no sample has."""
        numbered = NUMBERED_SUFFIX.fullmatch(suffix)
        kind = {".json": "json", ".txt": "text"}.get(f".{suffix}")
        kind = "still" if f".{suffix}" in IMAGE_SUFFIXES else "video" if f".{suffix}" in VIDEO_SUFFIXES else kind
        numbered = numbered if numbered and numbered[2] in IMAGE_SUFFIXES else None
        if kind is None and numbered is None:
            return False
        group = self.last = self.groups.setdefault(key, Group(key))
        if member.problem:
            group.complain(f"{quoted(member.name)}: {member.problem}")
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            group.complain(f"the name {quoted(member.name)} leads out of the archive")
        if numbered is not None:
            group.pictures.append((int(numbered[1]), member))
        elif getattr(group, kind) is None:
            setattr(group, kind, member)
        else:
            group.complain(f"both {quoted(getattr(group, kind).name)} and {quoted(member.name)}")
        return True

    def _move(self, group: Group, numbered: re.Match) -> None:
        """The picture of `group` goes to the sample that its name, less the number, leads to."""
        candidates = [numbered[1] + numbered[2], numbered[1]]
        described = [key for key in candidates if key in self.groups and self._is_described(self.groups[key])]
        base = (described or candidates[-1:])[0]  # pictures without a .json are one lost sample, not many
        target = self.groups.setdefault(base, Group(base))
        target.pictures.append((int(numbered[3]), group.still))
        target.problem = target.problem or group.problem
        if self.last is group:
            self.last = target
        del self.groups[group.key]

    @staticmethod
    def _is_described(group: Group) -> bool:
        return bool(group.json or group.text)

    def _leave(self, name: str) -> None:
        self.num_others += 1
        if len(self.others) < self._max_names:
            self.others.append(printable(name))


def printable(text: str) -> str:
    """`text` for lists and messages: at most 200 characters, what cannot be shown is escaped."""
    shown = text[:200] + ("..." if len(text) > 200 else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)


def quoted(text: str) -> str:
    return f"'{printable(text)}'"
