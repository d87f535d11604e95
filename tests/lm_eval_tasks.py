"""Tasks of lm-eval over a few lines of local text: a multiple choice, likelihoods of whole texts, and a generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml


def write_tasks(directory: Path, lines: Sequence[str]) -> Path:
    """Task files and their data, named by relative paths: `choose` (does a line go on with its end or with another's), `whole`, `go_on`."""
    directory.mkdir()
    words = [line.split() for line in lines]
    choices = [
        {
            "context": " ".join(own[: len(own) // 2]),
            "right": " ".join(own[len(own) // 2 :]),
            "wrong": " ".join(other[len(other) // 2 :]),
            "text": " ".join([*own, *other] * (1 + 9 * (index == 0))),  # one that is longer than the context
        }
        for index, (own, other) in enumerate(zip(words, [*words[1:], words[0]], strict=True))
    ]
    (directory / "lines.jsonl").write_text("".join(json.dumps(choice) + "\n" for choice in choices), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "lines.jsonl"}}, "test_split": "test"}
    tasks = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_target": 0,
            "doc_to_choice": ["{{right}}", "{{wrong}}"],
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
        },
        "whole": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "go_on": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{right}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, fields in tasks.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **fields}), encoding="utf-8")
    return directory
