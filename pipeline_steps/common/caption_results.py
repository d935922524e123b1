"""Schemas of the results about free answers."""

from pydantic import Field

from pipeline_steps.common.result import Interval, Result, Share


class CaptionStyle(Result):
    """How a group of texts is written, whatever it says. Words: lower case, without punctuation."""

    num_words: float
    """Mean words per text."""
    empty: Share
    """Share of texts without words."""
    repetition: Share
    """Share of four-word phrases (`_2`: word pairs) that repeat within a text."""
    distinct_1: Share | None
    """Distinct / all words, or word pairs."""
    distinct_2: Share | None
    """Distinct / all words, or word pairs."""
    same_opening: Share
    """Share with the commonest first three words."""
    same_text: Share
    """Share equal to the commonest text."""
    repetition_2: Share | None = None
    """Share of four-word phrases (`_2`: word pairs) that repeat within a text."""
    type_token_ratio: Share | None = None
    """Mean distinct / all words of a text."""
    num_sentences: float | None = None
    """Mean sentences per text."""
    proper_end: Share | None = None
    """Share ending with `.`, `!` or `?`."""
    technical: Share | None = None
    """Technical terms (`4k`, `fps`): share of texts, of words; texts by term."""
    technical_words: Share | None = None
    """Technical terms (`4k`, `fps`): share of texts, of words; texts by term."""
    technical_terms: dict[str, int] | None = None
    """Technical terms (`4k`, `fps`): share of texts, of words; texts by term."""


class Missed(Result):
    """What the texts name of the attributes that the packed sample knows."""

    complete_miss: Share
    """Share of texts that name no known attribute."""
    interval: Interval
    """Interval."""
    named: Share
    """Mean share of attributes named."""
    num_items: int = Field(ge=1)
    """Counts."""


class CaptionScore(Result):
    cider: float | None
    """CIDEr-D, 0 to 10, as pycocoevalcap 1.2; null: one item."""
    cider_interval: Interval | None
    """Interval."""
    bleu: Share
    """Corpus BLEU-4 (sacrebleu)."""
    meteor: Share
    """METEOR (NLTK), no synonyms: below published figures."""
    meteor_interval: Interval
    """Interval."""
    missed: dict[str, Missed]
    """By attribute: `colour`, `digit`, `bound` (colour with its own digit)."""
    style: CaptionStyle
    """Style."""


class Captions(Result):
    """Free answers of a task."""

    num_items: int = Field(ge=1)
    """Counts."""
    modes: dict[str, CaptionScore]
    """By mode."""
    reference: CaptionStyle
    """Style of references."""
    overlap_fine_coarse: Share
    """Words fine and coarse answers share: 2 x common / all."""
    overlap_interval: Interval
    """Interval."""
    same_fine_coarse: Share
    """Share of equal fine and coarse answers."""


class PartOverlap(Result):
    """Free answers to two parts of the same clips."""

    overlap: Share
    """As `overlap_fine_coarse`, `same_fine_coarse`."""
    interval: Interval
    """Interval."""
    same: Share
    """As `overlap_fine_coarse`, `same_fine_coarse`."""


class CaptionParts(Result):
    """Free answers for 4, 8 and 16 frames and for halves of the 16, same clips, autoregressive mode."""

    num_items: int = Field(ge=0)
    """Counts."""
    longest: int = Field(ge=1)
    """Frames of the longest chosen video."""
    reason: str | None = None
    """Why not measured."""
    reference: dict[str, Share] = {}
    """By part: overlap with the reference."""
    pairs: dict[str, PartOverlap] = {}
    """By pair of parts."""
    other_clip: Share | None = None
    """Overlap with another clip's answer."""
