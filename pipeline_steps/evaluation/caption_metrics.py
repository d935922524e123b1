"""Metrics of free-form text: similarity to a reference, style, and mentions of the visible objects.

All metrics use the same words: lower case, no punctuation. Every list of texts has one text per item, in item order.
"""

import math
import re
from collections import Counter
from functools import cache

import numpy as np

from pipeline_steps.common.caption_results import CaptionStyle

PACKAGES = ("nltk", "sacrebleu")  # of `meteor` and `bleu`, imported there
ORDERS = 4  # n-gram orders of the published BLEU-4 and CIDEr-D
SIGMA = 6.0  # words; width of CIDEr-D's length penalty
REPEATED = 4  # length of a phrase in words, for `repetition`
OPENING = 3  # number of first words, for `same_opening`

# words that describe the file and not the picture, as titles of stock footage do: the families of the terms that the
# predecessor counted (evaluate_captions_local.py: 4k, hd, uhd, 720p, 1080p, fps, 30fps, 60fps, 2160, 2560, 3840)
TECHNICAL = re.compile(r"(?:2|4|5|6|8|12)k|[fuq]?hd|\d{3,4}[pi]|\d*fps|2160|2560|3840|\d{3,4}x\d{3,4}")
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)")


def words(text):
    """The words of a text: lower case, letters and digits, with an apostrophe inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(tokens, order):
    return [tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)]


# ---------------------------------------------------------------- against the reference


def cider(texts, references):
    """CIDEr-D of every text, 0 to 10, with document frequencies from `references`: list of float.

    Follows the published scorer (Vedantam et al. 2015, CIDEr-D: clipped counts, Gaussian length penalty), one reference
    per text. ValueError for fewer than two texts: document frequencies need several references.
    """
    if len(references) < 2:
        raise ValueError(f"CIDEr of {len(references)} text: the frequency of words needs at least two references")
    pairs = [(words(text), words(reference)) for text, reference in zip(texts, references, strict=True)]
    frequency = Counter()
    for _, reference in pairs:
        frequency.update({gram for order in range(1, ORDERS + 1) for gram in ngrams(reference, order)})
    total = math.log(len(pairs))

    def vector(tokens, order):
        counts = Counter(ngrams(tokens, order))
        return {gram: count * (total - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}

    return [_similarity(text, reference, vector) for text, reference in pairs]


def _similarity(text, reference, vector):
    difference = len(ngrams(text, 2)) - len(ngrams(reference, 2))  # lengths as in the published scorer
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    total = 0.0
    for order in range(1, ORDERS + 1):
        one, other = vector(text, order), vector(reference, order)
        norms = math.hypot(*one.values()) * math.hypot(*other.values())
        if norms:
            total += sum(min(one[gram], other[gram]) * other[gram] for gram in one.keys() & other.keys()) / norms
    return 10 * penalty * total / ORDERS


def bleu(texts, references):
    """Corpus BLEU-4, 0 to 1, computed by sacrebleu with its exponential smoothing."""
    from sacrebleu import corpus_bleu  # only needed here

    prepared = [[" ".join(words(text)) for text in side] for side in (texts, references)]
    score = corpus_bleu(prepared[0], [prepared[1]], tokenize="none", force=True).score
    return min(1.0, score / 100)  # rounding can exceed 100


class _NoSynonyms:
    """Replaces WordNet, whose data NLTK does not ship."""

    @staticmethod
    def synsets(word):
        return []


def meteor(texts, references):
    """METEOR of every text, 0 to 1, computed by NLTK: exact and stem matches, no synonyms."""
    score = _meteor_score()
    pairs = zip(texts, references, strict=True)
    return [score([words(reference)], words(text), wordnet=_NoSynonyms) for text, reference in pairs]


@cache
def _meteor_score():
    from nltk.translate.meteor_score import meteor_score  # slow import, only needed here

    return meteor_score


def overlap(text, other):
    """Word overlap of two texts (Dice coefficient 2 |A n B| / (|A| + |B|)), 0 to 1; 1 if neither text has words."""
    one, two = Counter(words(text)), Counter(words(other))
    return 2 * (one & two).total() / (one.total() + two.total()) if one or two else 1.0


# ---------------------------------------------------------------- style


def style(texts):
    """`CaptionStyle` of texts, with or without a reference."""
    split = [words(text) for text in texts]
    return CaptionStyle(
        num_words=float(np.mean([len(tokens) for tokens in split])),
        empty=sum(not tokens for tokens in split) / len(split),
        repetition=repetition(split),
        distinct_1=distinct(split, 1),
        distinct_2=distinct(split, 2),
        same_opening=same_opening(split),
        same_text=largest_share(map(tuple, split), len(split)),
        repetition_2=repetition(split, 2),
        type_token_ratio=type_token_ratio(split),
        num_sentences=sum(map(num_sentences, texts)) / len(texts),
        proper_end=sum(map(ends_properly, texts)) / len(texts),
        **technical(split),
    )


def repetition(split, order=REPEATED):
    """Share of the phrases of `order` words that occurred earlier in the same text, over all texts; 0 if no text is
    that long."""
    phrases = [ngrams(tokens, order) for tokens in split]
    total = sum(map(len, phrases))
    return sum(len(own) - len(set(own)) for own in phrases) / total if total else 0.0


def distinct(split, order):
    """Number of distinct n-grams divided by the number of n-grams, over all texts; None without n-grams."""
    found = [gram for tokens in split for gram in ngrams(tokens, order)]
    return len(set(found)) / len(found) if found else None


def type_token_ratio(split):
    """Number of distinct words of a text divided by its words, mean over the texts with words; None without any."""
    ratios = [len(set(tokens)) / len(tokens) for tokens in split if tokens]
    return sum(ratios) / len(ratios) if ratios else None


def num_sentences(text):
    """Sentences of a text: what its end marks separate. A full stop inside a number separates nothing."""
    return sum(bool(words(part)) for part in SENTENCE_END.split(text))


def ends_properly(text):
    """Whether a text ends with a full stop, exclamation or question mark, in or before quotes and brackets."""
    found = list(SENTENCE_END.finditer(text.rstrip()))
    return bool(found) and found[-1].end() == len(text.rstrip()) and bool(words(text))


def technical(split):
    """{field of `CaptionStyle`: value} of the words that match TECHNICAL as a whole."""
    found = [[word for word in tokens if TECHNICAL.fullmatch(word)] for tokens in split]
    total = sum(map(len, split))
    return {
        "technical": sum(map(bool, found)) / len(split),
        "technical_words": sum(map(len, found)) / total if total else 0.0,
        "technical_terms": dict(sorted(Counter(word for own in found for word in set(own)).items())),
    }


def same_opening(split):
    """Share of the texts that begin with the most frequent opening: the first OPENING words, or all words of a shorter
    text. Texts without words have no opening."""
    return largest_share((tuple(tokens[:OPENING]) for tokens in split if tokens), len(split))


def largest_share(values, total):
    return max(Counter(values).values(), default=0) / total


# ---------------------------------------------------------------- visible objects


def attributes(objects):
    """{kind: set of word tuples that a text can name} for a sample's objects. Kinds: colour, digit (in any frame),
    bound (a colour directly followed by a digit of the same object). Kinds without entries are omitted."""
    colours = {tuple(words(entry.colour)) for entry in objects} - {()}
    digits = {(str(digit),) for entry in objects for digit in entry.digits}
    bound = {(*words(entry.colour), str(digit)) for entry in objects if words(entry.colour) for digit in entry.digits}
    return {kind: found for kind, found in (("colour", colours), ("digit", digits), ("bound", bound)) if found}


def named(text, truths):
    """How many of `truths` (tuples of words) occur in a text as consecutive words."""
    tokens = words(text)
    held = {gram for order in {len(truth) for truth in truths} for gram in ngrams(tokens, order)}
    return len(held & truths)
