"""Source `folder`: videos and images described by a Hugging Face VideoFolder / ImageFolder metadata file.

The folder holds media (subfolders allowed) and ONE metadata.jsonl, .json, .csv, .tsv or .parquet, or one in each of its
folders train/, validation/ and test/, with a row per question or caption:
    file_name              path of the media file, from the folder of the metadata; several rows may name the same file
    file_names             alternative: a list of images that form one sample (images_file_names is a synonym)
    caption                and / or
    question, answer       a row with a caption and a question makes two items; with `options` the answer is one of them
    messages               alternative: a whole chat, a list of {role, content}
    rejected               optional, the worse answer of a preference pair
    task, cue, target      optional, of the row's question (of its caption if it has no question)
    split, video_id, source, objects, num_source_frames   optional, of the file; one of its rows has to set them
LLaVA's columns image, video and conversations are taken for file_name(s) and messages. Other columns are not read:
summary.json lists them, and one that looks like a typo is an error.
Files in train/, validation/ (val, valid) or test/ are of that split. Only the images of a list are copied; of other
files, size and sha256 are recorded.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from pipeline_steps.common.errors import UserError, listing
from pipeline_steps.common.files import writable
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.schemas import RawSample, slug
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.sources import metadata as rows_of
from pipeline_steps.sources.folder_items import row_items

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif"}
VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".gif"
}  # fmt: skip
FILE_COLUMNS = ("split", "video_id", "source", "objects", "num_source_frames")
MAX_PROBLEMS = 20  # listed in one message
CONTAINER_SIZE = 2**30  # bytes, after which the next container is started


@dataclass(frozen=True)
class FolderContent:
    """What `read` found in a folder."""

    samples: list[RawSample]
    unreferenced: list[str]  # files that no row names
    ignored_columns: dict[str, list[str]]  # {metadata file: columns that are not read}, of files that have any


def read(
    folder: str | Path | None, name: str, relative_to: Path | None = None, output: Path | None = None
) -> FolderContent:
    """Read one sample per file (or list of images) in the metadata of `folder`, sorted by key.

    The source is `name` unless a row sets it. Paths are absolute, or relative to `relative_to`. Lists of images are
    copied into container files below `output`/`name`; those paths are relative to `output`. Nothing is quarantined:
    raises one UserError, with line numbers, for all rows whose files are missing or unreadable, then for all whose
    items are invalid, and stops at any other mistake in the metadata.
    """
    folder = _existing_folder(folder)
    metadata_files, present = rows_of.find(folder)
    finder = FileFinder(folder, present)
    files: dict[tuple[str, ...], tuple[Path, list[tuple[int, dict]]]] = {}
    ignored, problems = {}, []
    for metadata in metadata_files:
        place = metadata.parent.relative_to(folder)
        lines, unread = rows_of.read(metadata)
        if unread:
            ignored[metadata.relative_to(folder).as_posix()] = unread
        for line, row in lines:
            try:
                names = _file_names(finder, place, f"{metadata} line {line}", row)
                files.setdefault(names, (metadata, []))[1].append((line, row))
            except UserError as error:
                problems.append(str(error))
    _refuse_all(folder, problems)
    values_of = {names: _file_values(metadata, names, rows) for names, (metadata, rows) in files.items()}
    keys = _keys({names: values.get("source") or name for names, values in values_of.items()})
    container = Container(output, name)
    samples = []
    for names, (metadata, rows) in progress_bar(f"reading {name}", files.items(), unit="file"):
        where = f"{metadata} line {rows[0][0]} ({_shown(names)})"
        values = {"source": name, "video_id": names[0], **values_of[names]}
        try:
            values["items"] = [item for line, row in rows for item in row_items(metadata, line, row, _shown(names))]
        except UserError as error:
            problems.append(str(error))
            continue
        try:
            media = _media(folder, names, relative_to) if len(names) == 1 else container.add(folder, names)
            samples.append(RawSample(key=keys[names], **media, **values))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "row"
            problem = f"{place}: {first['msg']}, found {str(first['input'])[:100]!r}"
            problems.append(f"{where}: {problem}.")
        except OSError as error:
            problems.append(f"{where}: {error.filename or folder} cannot be read ({error.strerror}).")
    _refuse_all(folder, problems)
    samples.sort(key=lambda sample: sample.key)
    unreferenced = sorted(present - {name for names in files for name in names})
    unreferenced = [name.encode("utf-8", "backslashreplace").decode() for name in unreferenced]
    return FolderContent(samples, unreferenced, ignored)


def _refuse_all(folder: Path, problems: list[str]) -> None:
    """Raise one UserError that lists the problems, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = listing(problems[:MAX_PROBLEMS], len(problems))
        raise UserError(f"{folder}: {len(problems)} rows are unusable. Correct or remove them:\n{listed}")


def _media(folder: Path, names: tuple[str], relative_to: Path | None) -> dict:
    """The media fields of a RawSample stored in one file."""
    path = folder / names[0]
    return {
        "path": str(path.relative_to(relative_to)) if relative_to else str(path),
        "kind": "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video",
        "sha256": media_sha256(path),
        "size": path.stat().st_size,
    }


class Container:
    """Concatenates the images of multi-image samples into container files of about CONTAINER_SIZE bytes."""

    def __init__(self, output: Path | None, name: str):
        self._output, self._name, self._number, self._end = output, name, 0, 0

    def add(self, folder: Path, names: tuple[str, ...]) -> dict:
        """Append the images and return the media fields of their RawSample. Raises OSError for an unreadable image."""
        if self._output is None:
            raise UserError(
                f"{folder}: the images {_shown(names)} form one sample, but there is no output folder for them."
            )
        if self._end >= CONTAINER_SIZE:
            self._number, self._end = self._number + 1, 0
        path = Path(self._name) / f"{self._number:05d}.bin"
        parts, contents = [], [(folder / name).read_bytes() for name in names]
        with writable(self._output / path):
            (self._output / path).parent.mkdir(exist_ok=True)
            with open(self._output / path, "ab") as file:
                for content in contents:
                    file.write(content)
                    parts.append((self._end, len(content)))
                    self._end += len(content)
        sha256 = hashlib.sha256(b"".join(contents)).hexdigest()
        return {
            "path": str(path),
            "parts": tuple(parts),
            "kind": "image",
            "sha256": sha256,
            "size": sum(map(len, contents)),
        }


def _existing_folder(folder: str | Path | None) -> Path:
    hint = "Set it with `dvc exp run -S data=folder -S sources.folder.path=/path/to/folder`."
    if not folder:
        raise UserError(f"sources.folder.path is not set, but sources.collect lists folder. {hint}")
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"sources.folder.path: {folder} {problem}. {hint}")
    return folder


def _shown(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _file_names(finder: "FileFinder", place: Path, where: str, row: dict) -> tuple[str, ...]:
    """Return the files of a row in metadata of the subfolder `place`: one file, or several images."""
    given = [column for column in rows_of.NAME_COLUMNS if row.get(column) is not None]
    if len(given) > 1:
        raise UserError(f"{where}: found both {given[0]} and {given[1]}. Keep one of them.")
    if not given or given == ["file_name"]:
        return (finder.find(place, where, row.get("file_name")),)
    listed = row[given[0]]
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: {given[0]} is {str(listed)[:50]!r}, expected a list of images.")
    names = tuple(finder.find(place, where, name) for name in listed)
    videos = [name for name in names if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES]
    if videos and len(names) > 1:
        raise UserError(
            f"{where}: {videos[0]!r} is a video, but a list of files may hold images only. Write one row per video."
        )
    return names


class FileFinder:
    """Finds the files that rows name, also by Windows paths and by names in another Unicode form (NFC, NFD)."""

    def __init__(self, folder: Path, present: set[str]):
        self.folder = folder
        self._by_form: dict[str, list[str]] = {}
        for name in sorted(present):
            self._by_form.setdefault(unicodedata.normalize("NFC", name), []).append(name)

    def find(self, place: Path, where: str, given) -> str:
        """Return the name, from `folder`, of the file that a row calls `given`, from `folder`/`place`. UserError."""
        if given is None:
            raise UserError(
                f"{where}: the row names no file. Add file_name, or move a chat without media to sources.chat.path."
            )
        if isinstance(given, dict) and "bytes" in given:
            raise UserError(
                f"{where}: the row holds a picture itself, expected the name of a file. Save the pictures as files."
            )
        shown = repr(given)[:300]  # a whole path, but not a whole picture
        if not isinstance(given, str) or not given.strip():
            raise UserError(f"{where}: file_name is {shown}, expected the name of a file.")
        spellings = [PurePosixPath(name) for name in dict.fromkeys((given, given.replace("\\", "/")))]
        if any(path.is_absolute() or ".." in path.parts for path in spellings):
            raise UserError(f"{where}: file_name {shown} is outside of {self.folder}. Use names inside the folder.")
        path = spellings[0]
        if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise UserError(f"{where}: {shown} has no known video or image suffix. Known: {known}")
        if any(len(part.encode("utf-8")) > 255 for part in path.parts):
            raise UserError(
                f"{where}: file_name {given[:50]!r}... is too long: a part of it exceeds 255 bytes. Rename the file."
            )
        for spelling in spellings:
            if (self.folder / place / spelling).is_file():
                return (PurePosixPath(place) / spelling).as_posix()
        for spelling in spellings:
            form = unicodedata.normalize("NFC", (PurePosixPath(place) / spelling).as_posix())
            found = self._by_form.get(form, [])
            if len(found) > 1:
                raise UserError(f"{where}: file_name {shown} could be {found[0]!a} or {found[1]!a}. Rename one.")
            if found:
                return found[0]
        problem = self._problem(place, spellings[-1])
        raise UserError(f"{where}: file_name {shown} {problem}. Add the file or remove the row.")

    def _problem(self, place: Path, path: PurePosixPath) -> str:
        if (self.folder / place / path).is_dir():
            return f"is a folder in {self.folder / place}"
        form = unicodedata.normalize("NFC", (PurePosixPath(place) / path).as_posix()).casefold()
        similar = next((name for name in self._by_form if name.casefold() == form), None)
        hint = f", which has {similar!r} (upper and lower case count)" if similar else ""
        return f"does not exist in {self.folder / place}{hint}"


def _file_values(metadata: Path, names: tuple[str, ...], rows: list[tuple[int, dict]]) -> dict:
    """Return the file-level columns, merged over the rows of a file. Raises UserError if two rows disagree."""
    values, given_in = {}, {}
    for line, row in rows:
        for name in FILE_COLUMNS:
            if row.get(name) is None:
                continue
            if name == "source" and (not isinstance(row[name], str) or not slug(row[name])):
                raise UserError(
                    f"{metadata} line {line} ({_shown(names)}): source is {repr(row[name])[:100]}, but it is the "
                    "prefix of sample keys: use a name with letters or digits, or remove it."
                )
            if name in values and values[name] != row[name]:
                both = f"{values[name]!r} in line {given_in[name]} and {row[name]!r} in line {line}"
                raise UserError(f"{metadata}: {_shown(names)} has {name} {both[:300]}. Use one {name} per file.")
            values[name], given_in[name] = row[name], line
    splits = {rows_of.split_of(name) for name in names}
    if len(splits) > 1:
        raise UserError(
            f"{metadata} line {rows[0][0]} ({_shown(names)}): its images are in the folders of several splits "
            f"({', '.join(sorted(map(str, splits)))}). Move them into one."
        )
    (split,) = splits
    if split is not None and values.setdefault("split", split) != split:
        raise UserError(
            f"{metadata} line {given_in['split']} ({_shown(names)}): split is {values['split']!r}, but the folder is "
            f"{names[0].split('/')[0]}/, which means {split!r}. Move the file, or correct the column."
        )
    return values


def _keys(sources: dict[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """Return {file names: unique key}. Names whose slugs are ambiguous get a part of their hash as a suffix."""
    plain = {
        names: f"{slug(source)}-{slug(str(PurePosixPath(names[0]).with_suffix('')))}"
        for names, source in sources.items()
    }
    counts = Counter(key.lower() for key in plain.values())
    keys = {}
    for names, key in plain.items():
        unique = len(names) == 1 and counts[key.lower()] == 1 and not key.endswith("-")
        keys[names] = key if unique else f"{key}-{hashlib.sha256('/'.join(names).encode()).hexdigest()[:8]}"
    return keys
