"""Known corpora by name, each pinned: where its files are, which state of them, the text key, licence and size. Downloads nothing.

Revisions are commits of the Hugging Face hub, or the sha256 of a published list of files. The files and text keys of a
corpus are those that Marin trains on (marin-community/marin, experiments/pretraining_datasets and experiments/paloma.py).
A source `LIST#GLOB` is a file that lists others, one a line, a URL or a path from the root of the list's server; the glob
picks among them. `source_bytes` is what there is to download, as published; where it is an estimate, a comment says how.
Bad documents are skipped and counted: among billions of them, there are some.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from model.config_base import Config
from tasks.mixture_config import Dataset, Mixture
from tasks.vocabularies import HuggingFaceFile

_TIB = 1 << 40


def _hub(name: str, repository: str, revision: str, *globs: str, **fields: Any) -> Dataset:
    """A dataset of the Hugging Face hub at a commit, with the files that the globs match."""
    sources = tuple(f"hf://datasets/{repository}@{revision}/{glob}" for glob in globs)
    homepage = f"https://huggingface.co/datasets/{repository}"
    return Dataset(
        name=name,
        source=sources[0] if len(sources) == 1 else sources,
        revision=revision,
        homepage=homepage,
        **{"on_bad_document": "skip", **fields},
    )


# 27,838 files. Their last lines have no newline, so they must not be joined byte by byte.
dclm_baseline = _hub(
    "dclm_baseline",
    "mlfoundations/dclm-baseline-1.0",
    "a3b142c183aebe5af344955ae20836eb34dcf69b",
    "global-shard_*/local-shard_*/*.jsonl.zst",
    format="jsonl",
    licence="CC-BY-4.0",
    source_bytes=7_196_105_155_016,
)

# Gated. The size is that of the text (783 GB of code, 54 of issues, 13 of notebooks, 32 of commits): as parquet it is less.
starcoderdata = _hub(
    "starcoderdata",
    "bigcode/starcoderdata",
    "9fc30b578cedaec69e47302df72cf00feed7c8c4",
    "*/train-*.parquet",
    format="parquet",
    text_key="content",
    licence="The Stack Terms of Use; each file keeps the permissive licence of its repository",
    source_bytes=882_000_000_000,
)

# The size is an estimate: no total is published, so its 55e9 tokens at the 1.43 compressed bytes a token of SlimPajama.
proofpile_2 = _hub(
    "proofpile_2",
    "EleutherAI/proof-pile-2",
    "901a9273a770e9d4138c5ddd91802f9c5c6cdc4b",
    "*/train/*.jsonl.zst",
    format="jsonl",
    licence="mixed: each subset and each file keeps its own",
    source_bytes=79_000_000_000,
)

# Marin's FineWeb is an older commit, known by its prefix alone (cd85054). The size is an estimate: 18.5e12 tokens at the
# 43,056.6 GB for 15,835.2e9 tokens of version 1.1, for which the card has both.
fineweb = _hub(
    "fineweb",
    "HuggingFaceFW/fineweb",
    "9bb295ddab0e05d785b879661af7260fed5140fc",
    "data/*/*.parquet",
    format="parquet",
    licence="ODC-By-1.0",
    source_bytes=50_300_000_000_000,
)

# The size is an estimate: 1.3e12 tokens at the 28,518,193,415 bytes of its sample of 10e9 tokens.
fineweb_edu = _hub(
    "fineweb_edu",
    "HuggingFaceFW/fineweb-edu",
    "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    "data/*/*.parquet",
    format="parquet",
    licence="ODC-By-1.0",
    source_bytes=3_700_000_000_000,
)

slimpajama_627b = _hub(
    "slimpajama_627b",
    "cerebras/SlimPajama-627B",
    "2d0accdd58c5d5511943ca1f5ff0e3eb5e293543",
    "train/chunk*/*.jsonl.zst",
    format="jsonl",
    licence="Apache-2.0; each source keeps its own",
    source_bytes=895_000_000_000,
)

# The size is an estimate: 48 files like the first, which has 292,286,056 bytes.
slimpajama_6b = _hub(
    "slimpajama_6b",
    "DKYoon/SlimPajama-6B",
    "b5f90f419b7489cdba26fdbc8c022fcb5562f968",
    "data/train-*.parquet",
    format="parquet",
    licence="Apache-2.0; each source keeps its own",
    source_bytes=14_030_000_000,
)

_DOLMA_REVISION = "7f48140530a023e9ea4c5cfb141160922727d4d3"
_DOLMA_LIST_SHA256 = "9fa8c2f0eb57149ff7914b35ca2ffb8da221c02786d712bcba5f6c39d294b49e"


def _dolma(name: str, *globs: str, **fields: Any) -> Dataset:
    """Files of Dolma 1.7, which lie outside the hub; the hub has the list of their URLs."""
    return _hub(
        name,
        "allenai/dolma",
        _DOLMA_REVISION,
        *(f"urls/v1_7.txt#{glob}" for glob in globs),
        format="jsonl",
        sha256={"v1_7.txt": _DOLMA_LIST_SHA256},
        licence="ODC-By-1.0",
        **fields,
    )


dolma = _dolma("dolma", "**/*.json.gz", source_bytes=4_500_000_000_000)

_DOLMA_PARTS = {
    "algebraic-stack": (12.6, "algebraic-stack-train-*"),
    "arxiv": (28.0, "arxiv-*"),
    "gutenberg": (5.3, "books-*"),
    "c4": (124.95, "c4-*"),
    "cc": (597.75, "cc_en_head-*", "cc_en_middle-*", "cc_en_tail-*"),
    "cc-news": (14.3, "cc_news_head-*", "cc_news_middle-*", "cc_news_tail-*"),
    "falcon": (456.4, "falcon-*"),
    "megawika": (4.6, "megawika-*"),
    "open-web-math": (12.6, "open-web-math-train-*"),
    "pes2o": (57.2, "pes2o-*"),
    "reddit": (79.9, "reddit-*"),
    "stackexchange": (19.6, "stackexchange-*"),
    "starcoder": (263.8, "starcoder-*"),
    "flan": (16.5, "tulu_flan-*"),
    "wiki": (7.4, "wiki-*"),
}
# Dolma by source, for mixtures: `weights` are the billions of tokens that OLMo 7B 1.7 drew from each.
dolma_parts: Mapping[str, Dataset] = MappingProxyType(
    {
        part: _dolma(f"dolma_{part.replace('-', '_')}", *(f"**/{glob}.json.gz" for glob in globs))
        for part, (_, *globs) in _DOLMA_PARTS.items()
    }
)
dolma_weights: Mapping[str, float] = MappingProxyType({dolma_parts[part].name: weight for part, (weight, *_) in _DOLMA_PARTS.items()})

# The sha256 of the list of its files is the revision: Common Crawl's server gives no other.
_NEMOTRON_CC_LIST = "https://data.commoncrawl.org/contrib/Nemotron/Nemotron-CC/data-jsonl.paths.gz"
_NEMOTRON_CC_LIST_SHA256 = "d8201c1e05b5e9fecef7678457c172f98a19a25f1dd656cdba1f937e7a29e68e"


def _nemotron_cc(name: str, glob: str, source_bytes: int) -> Dataset:
    """Files of Nemotron-CC on Common Crawl's server; the partition keys are folders of their paths."""
    return Dataset(
        name=name,
        source=f"{_NEMOTRON_CC_LIST}#{glob}",
        sha256={"data-jsonl.paths.gz": _NEMOTRON_CC_LIST_SHA256},
        revision=_NEMOTRON_CC_LIST_SHA256,
        format="jsonl",
        on_bad_document="skip",
        licence="unclear: described as under Common Crawl's Terms of Use and as under an NVIDIA data agreement; read both",
        homepage="https://data.commoncrawl.org/contrib/Nemotron/Nemotron-CC/index.html",
        source_bytes=source_bytes,
    )


nemotron_cc = _nemotron_cc("nemotron_cc", "**/*.jsonl.zstd", int(10.4 * _TIB))

# TiB of each as Marin has them, compressed by gzip, which it also takes for the weights.
_NEMOTRON_CC_PARTS = {
    "hq_actual": (0.91351, "quality=high/kind=actual"),
    "hq_synth": (2.72, "quality=high/kind=synthetic"),
    "medium_high": (0.82471, "quality=medium-high"),
    "medium": (3.38, "quality=medium"),
    "medium_low": (1.54, "quality=medium-low"),
    "low_actual": (0.70123, "quality=low/kind=actual"),
    "low_synth": (0.62771, "quality=low/kind=synthetic"),
}
nemotron_cc_parts: Mapping[str, Dataset] = MappingProxyType(
    {
        part: _nemotron_cc(f"nemotron_cc_{part}", f"**/{folder}/**/*.jsonl.zstd", int(tib * _TIB))
        for part, (tib, folder) in _NEMOTRON_CC_PARTS.items()
    }
)
nemotron_cc_weights: Mapping[str, float] = MappingProxyType(
    {nemotron_cc_parts[part].name: tib for part, (tib, _) in _NEMOTRON_CC_PARTS.items()}
)

_PALOMA_FOLDERS = {
    "4chan": "4chan_meta_sep",
    **{
        name: name
        for name in (
            "c4_100_domains",
            "c4_en",
            "dolma-v1_5",
            "dolma_100_programing_languages",
            "dolma_100_subreddits",
            "falcon-refinedweb",
            "gab",
            "m2d2_s2orc_unsplit",
            "m2d2_wikipedia_unsplit",
            "manosphere_meta_sep",
            "mc4",
            "ptb",
            "redpajama",
            "twitterAAE_HELM_fixed",
            "wikitext_103",
        )
    },
}
# Gated. The sizes are estimates: the repository has about 1.2e9 bytes in 16 sets of two splits each, so each gets the mean.
paloma: Mapping[str, Dataset] = MappingProxyType(
    {
        name: _hub(
            f"paloma_{name.replace('-', '_')}",
            "allenai/paloma",
            "65cd6fc59dba021b21db414fa5e8d7765ffbe5e6",
            f"{folder}/val/val*.jsonl.gz",
            format="jsonl",
            holdout=1.0,
            tags=(f"paloma/{name}",),
            licence="AI2 ImpACT Low Risk, with exceptions by set",
            source_bytes=1_200_000_000 // 32,
        )
        for name, folder in _PALOMA_FOLDERS.items()
    }
)

# Llama 3's vocabulary and special tokens from a repository that asks for no licence click; meta-llama/Llama-3.1-8B
# (commit d04e592bb4f6aa9cfee91e2e20afa771667e1d4b) has the same ids and is gated.
llama3_tokenizer = HuggingFaceFile(
    path="hf://marin-community/marin-tokenizer@a5ca45f2feb6c959bd87b81689aa7279b5bdcaa2/tokenizer.json",
    bos_token="<|begin_of_text|>",  # noqa: S106  (no password)
    eos_token="<|end_of_text|>",  # noqa: S106
    vocab_size=128_256,
)

# The rates of the DCLM 1B and 7B runs, in trillions of tokens of each corpus; Paloma's sets are evaluated as they go.
dclm_mixture_config_llama3 = Mixture(
    name="dclm_llama3",
    datasets=(dclm_baseline, starcoderdata, proofpile_2, *paloma.values()),
    weights={"dclm_baseline": 3.8, "starcoderdata": 0.25, "proofpile_2": 0.055},
    tokenizer=llama3_tokenizer,
)

# Tokens as their publishers count them, each by a tokenizer of its own.
_PUBLISHED_TOKENS = {
    "dclm_baseline": 3_800_000_000_000,
    "starcoderdata": 250_000_000_000,
    "proofpile_2": 55_000_000_000,
    "fineweb": 18_500_000_000_000,
    "fineweb_edu": 1_300_000_000_000,
    "slimpajama_627b": 627_000_000_000,
    "slimpajama_6b": 6_000_000_000,
    "dolma": 3_000_000_000_000,
    "nemotron_cc": 6_300_000_000_000,
}


class CatalogueEntry(Config):
    """What a person wants to know of a corpus before choosing it."""

    name: str
    text_key: str
    licence: str
    source_bytes: int
    tokens: int | None
    revision: str
    homepage: str


def catalogue() -> tuple[CatalogueEntry, ...]:
    """All corpora, those to train on first, then Paloma's sets; parts of a corpus are not listed apart from it."""
    trained = (dclm_baseline, starcoderdata, proofpile_2, dolma, nemotron_cc, fineweb, fineweb_edu, slimpajama_627b, slimpajama_6b)
    return tuple(
        CatalogueEntry(
            **{field: getattr(dataset, field) for field in CatalogueEntry.model_fields if field != "tokens"},
            tokens=_PUBLISHED_TOKENS.get(dataset.name),
        )
        for dataset in (*trained, *paloma.values())
    )
