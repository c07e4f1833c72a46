"""The section `prepare`: how the documents of each source are created from raw dumps."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from llama_jax.config.data import Fraction, StoragePath
from llama_jax.config.model import STRICT, PositiveFloat, PositiveInt, StrictBool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RawInputs:
    """The keys that every kind of source has."""

    inputs: tuple[StoragePath, ...] = Field(
        min_length=1,
        description="raw files: paths, folders and globs, here or in buckets; of equal documents"
        " the first in this order remains",
    )
    near_duplicates: Annotated[float, Field(ge=0.7, le=1)] | None = Field(
        default=None,
        description="the later one of two documents is removed if the Jaccard similarity of their"
        " sequences of 5 words is at least this, such as 0.8; null: near-duplicates remain",
    )
    decontaminate: StoragePath | None = Field(
        default=None,
        description="folder of evaluation sets, as for `eval --data`, whose questions and answers"
        " are cut out of the documents; null: none",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CommonCrawlEntry(RawInputs):
    """Pages of CommonCrawl (WARC or WET files) by the CCNet pipeline (arXiv 1911.00359)."""

    kind: Literal["commoncrawl"]
    main_content: StrictBool = Field(
        default=True, description="for WARC: leave out navigation, headers, footers and the like"
    )
    min_characters: PositiveInt = Field(
        default=300, description="a page with fewer characters is removed, as CCNet does"
    )
    line_files: PositiveInt | None = Field(
        default=None,
        description="number of consecutive files in which a line may occur once (CCNet compared 50"
        " of the 1,600 parts of a snapshot); null: in all files",
    )
    languages: tuple[str, ...] = Field(
        default=("en",), min_length=1, description="languages that remain, by ISO 639-1 code"
    )
    min_language: Fraction = Field(
        default=0.5, description="probability of the language below which a page is removed"
    )
    quality_model: StoragePath | None = Field(
        default=None, description="n-gram model (KenLM) of good text; null: no rule on perplexity"
    )
    quality_tokenizer: StoragePath | None = Field(
        default=None,
        description="SentencePiece model of the text on which quality_model is trained",
    )
    perplexity_limits: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None,
        description="perplexities that divide head from middle and middle from tail (CCNet: such"
        " that each has a third of the pages); null: write the perplexity of each page only",
    )
    buckets: tuple[Literal["head", "middle", "tail"], ...] = Field(
        default=("head", "middle"), min_length=1, description="buckets of perplexity that remain"
    )
    reference_model: StoragePath | None = Field(
        default=None,
        description="fastText classifier of pages that Wikipedia cites as references against random"
        " pages; null: no such rule",
    )
    reference_label: str = Field(
        default="reference", description="label of references in reference_model (__label__ apart)"
    )
    min_reference: Fraction = Field(
        default=0.5, description="probability of this label below which a page is removed"
    )

    @model_validator(mode="after")
    def _check(self) -> "CommonCrawlEntry":
        if (self.quality_model is None) != (self.quality_tokenizer is None):
            raise ValueError("give quality_model and quality_tokenizer together, or omit both")
        limits = self.perplexity_limits
        if limits and self.quality_model is None:
            raise ValueError("perplexity_limits need quality_model: add it, or omit the limits")
        if limits and limits[0] >= limits[1]:
            raise ValueError(
                f"perplexity_limits ({limits[0]}, {limits[1]}): the first must be the smaller one"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class C4Entry(RawInputs):
    """Pages of CommonCrawl (WARC or WET files) by the rules of C4 (arXiv 1910.10683, 2.2)."""

    kind: Literal["c4"]
    main_content: StrictBool = Field(
        default=True, description="for WARC: leave out navigation, headers, footers and the like"
    )
    min_words: PositiveInt = Field(
        default=5, description="a line with fewer words is removed from its page"
    )
    min_sentences: PositiveInt = Field(
        default=3, description="a page with fewer sentences is removed"
    )
    languages: tuple[str, ...] = Field(
        default=("en",), min_length=1, description="languages that remain, by ISO 639-1 code"
    )
    min_language: Fraction = Field(
        default=0.65,
        description="probability of the language below which a page is removed (C4's 0.99 is of"
        " langdetect, whose probabilities are nearer to 1)",
    )
    bad_words: StoragePath | None = Field(
        default=None,
        description="text file with one word or phrase a line; a page with any of them is removed;"
        " null: no such rule",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GitHubEntry(RawInputs):
    """Source code: archives or folders of repositories, JSON lines, Parquet.

    The rules are those of LLaMA's paper, section 2.1.
    """

    kind: Literal["github"]
    licenses: tuple[str, ...] = Field(
        default=("MIT", "BSD", "Apache"),
        min_length=1,
        description="licences that remain, by SPDX name or its beginning; a repository without a"
        " licence, or with another one, is removed",
    )
    license: str | None = Field(
        default=None,
        description="licence of the inputs in which no licence is found, as in packages of Debian",
    )


# LLaMA's paper: "20 languages, which use either the Latin or Cyrillic scripts".
WIKIPEDIA_LANGUAGES = (
    "bg", "ca", "cs", "da", "de", "en", "es", "fr", "hr", "hu",
    "it", "nl", "pl", "pt", "ro", "ru", "sl", "sr", "sv", "uk",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WikipediaEntry(RawInputs):
    """Dumps of Wikipedia (XML), or texts in several languages (arXiv 2302.13971, 2.1)."""

    kind: Literal["wikipedia"]
    languages: tuple[str, ...] = Field(
        default=WIKIPEDIA_LANGUAGES,
        min_length=1,
        description="languages that remain, by ISO 639-1 code",
    )
    min_language_share: Fraction = Field(
        default=0.5,
        description="a page is removed if a smaller share of its paragraphs, in characters, is in"
        " the page's language: pages that are translated in part",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BooksEntry(RawInputs):
    """Books: .txt, .epub, .html, or JSON lines (arXiv 2302.13971, 2.1)."""

    kind: Literal["books"]
    max_overlap: Annotated[float, Field(ge=0.8, le=1)] = Field(
        default=0.9,
        description="the later one of two books is removed if they have at least this share of the"
        " larger book's sequences of 5 words in common",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ArxivEntry(RawInputs):
    """LaTeX sources: arXiv's .tar files, or .tex and .Rnw files (LLaMA's paper, section 2.1)."""

    kind: Literal["arxiv"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StackExchangeEntry(RawInputs):
    """Questions with answers: Posts.xml of Stack Exchange (LLaMA's paper, section 2.1)."""

    kind: Literal["stackexchange"]
    sites: tuple[str, ...] = Field(
        default=(),
        description="sites that remain, by the name of the folder of Posts.xml; []: all",
    )


SourceEntry = Annotated[
    CommonCrawlEntry
    | C4Entry
    | GitHubEntry
    | WikipediaEntry
    | BooksEntry
    | ArxivEntry
    | StackExchangeEntry,
    Field(discriminator="kind"),
]
KINDS = get_args(get_args(SourceEntry)[0])  # the classes
