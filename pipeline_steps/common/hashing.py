"""Hashes that identify files, media and work. A change here invalidates every stage."""

import hashlib
import json
from pathlib import Path


def sha256_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(folder):
    """sha256 of what makes token ids of text in a folder's tokenizer.json. Padding, truncation and post-processing are
    left out: the library writes its own when it saves a tokenizer."""
    content = json.loads((Path(folder) / "tokenizer.json").read_text())
    parts = {name: content.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def media_sha256(path, parts=()):
    """sha256 of a sample's media: of a file, of its concatenated `parts`, or of the files of a folder sorted by
    name."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(entry for entry in path.iterdir() if entry.is_file()):
            digest.update(file.read_bytes())
        return digest.hexdigest()
    if not parts:
        return sha256_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for offset, size in parts:
            file.seek(offset)
            digest.update(file.read(size))
    return digest.hexdigest()


def fingerprint(*parts):
    """16 hex digits that identify the parts. Each part is a Path (its content is hashed) or JSON-serialisable."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
