"""The card of an exported model, its README.md: what it is, what it was trained on, how well it does, how to load it.

Written from the step's configuration and the manifests of its inputs alone: it has no date, and names no machine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from model.flops import num_parameters
from model.origin import Origin, origin_of
from model.secret_text import without_secrets
from tasks.config import ExportConfig, TrainingStep
from tasks.data_steps import RawFiles, RegisteredTask, TfdsTask
from tasks.experiment_record import read_record
from tasks.formatting import number
from tasks.places import Place, place_of_working
from tasks.steps import Step
from tasks.summary import begins_at, four_digits

CARD = "README.md"
_HUB_DATASET = re.compile(r"huggingface\.co/datasets/([\w.-]+/[\w.-]+)")
LICENCE_PLACEHOLDER = (
    "**Not chosen yet.** Choose one before you publish the model: replace `license: unknown` at the top of this file, and this paragraph. "
    "The licences of the datasets above may ask for something."
)


def model_card(training: Step, export: ExportConfig, stats: dict[str, Any], directory: Path, step: int) -> str:
    """The card of the export of `step` of a training, in `directory`, where its config.json already is.

    `stats`: of the training up to that step, as its manifest has them when it is done; what is not in them is left out.
    """
    config = training.config
    assert isinstance(config, TrainingStep)
    datasets = dataset_rows(training, stats.get("components") or {})
    exported = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture, count = exported["architectures"][0], num_parameters(config.model.with_vocab(exported["vocab_size"]))
    begin = begins_at(stats) if "origin" in stats else origin_of(config.train).step
    last, run = config.train.num_train_steps, place_of_working(directory.absolute().parent)
    tokens = Origin(begin).rows_until(config.train.batch_schedule, step) * config.train.seq_len_for(config.model)
    steps = f"{step - begin:,} steps" if step == last else f"the first {step - begin:,} of {last - begin:,} steps"
    after = f", after step {begin:,} of that one," if begin else ""
    parts = [
        _front_matter(datasets),
        f"# {training.name}",
        f"A language model of {number(count)} parameters (`{architecture}`), trained from "
        f"{'scratch' if config.initial_weights is None else 'the weights of another one'} on {number(tokens)} tokens in "
        f"{steps}{after} with prefect-llama. It goes on from a text; it was not taught to follow instructions"
        f"{' beyond what its data shows' if datasets else ''}, and was not made safe for any use.",
        "## How to load it\n\n" + _how_to_load(),
        "## What it was trained on\n\n" + _dataset_table(datasets),
        "## How well it does\n\n" + _losses(stats.get("final") or {}),
        "## How it was trained\n\n" + _configuration(config, export, training.fingerprint, _code(run)),
        "## Licence\n\n" + LICENCE_PLACEHOLDER,
    ]
    return without_secrets("\n\n".join(parts)) + "\n"


def dataset_rows(training: Step, read: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Of each dataset that was trained on: name, licence, revision, homepage, tokens and epochs, where known."""
    mixture = training.upstream[0]
    raw = {step.name: step.config for step in mixture.upstream if step.kind == "raw"}
    rows: list[dict[str, Any]] = []
    for tokens in (step for step in mixture.upstream if step.kind == "tokens" and (not read or step.name in read)):
        files = raw.get(tokens.name)
        row: dict[str, Any] = {"name": tokens.name, **read.get(tokens.name, {})}
        if isinstance(files, RawFiles):
            row |= {"licence": files.licence, "revision": files.revision, "homepage": files.homepage}
        elif isinstance(tokens.config, RegisteredTask):
            row |= {"revision": tokens.config.revision, "from": f"SeqIO task {tokens.config.task}"}
        elif isinstance(tokens.config, TfdsTask):
            row |= {"from": f"TFDS {tokens.config.name}"}
        rows.append(row)
    return rows


def _front_matter(datasets: list[dict[str, Any]]) -> str:
    """The metadata that the hub reads."""
    on_hub = {found[1] for row in datasets if (found := _HUB_DATASET.search(row.get("homepage") or ""))}
    fields = {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefect-llama"],
        **({"datasets": sorted(on_hub)} if on_hub else {}),
    }
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())  # JSON is YAML too
    return f"---\n{lines}---"


def _how_to_load() -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'place = "."  # this directory, or the repository on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(place)\nmodel = AutoModelForCausalLM.from_pretrained(place)\n"
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))\n```\n\n"
        'or, with the project that made it, `python flows/generate.py PLACE "Once upon a time"`, where PLACE is this directory.'
    )


def _dataset_table(datasets: list[dict[str, Any]]) -> str:
    lines = ["| dataset | licence | revision | tokens read | epochs |", "|---|---|---|---|---|"]
    for row in datasets:
        name = f"[{row['name']}]({row['homepage']})" if row.get("homepage") else row["name"]
        where = f" ({row['from']})" if row.get("from") else ""
        tokens, epochs = (f"{row[key]:,.6g}" if row.get(key) is not None else "" for key in ("tokens", "epochs"))
        cells = (f"{name}{where}", row.get("licence") or "not stated", row.get("revision") or "", tokens, epochs)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _losses(final: dict[str, Any]) -> str:
    """The last values of the curves: held-out text, all together and by dataset, and the training loss."""
    lines = ["| text | nats per token | bits per byte |", "|---|---|---|"]
    lines.append(f"| training, the last logged step | {four_digits(final.get('train/loss'))} | |")
    for key in (key for key in final if key.startswith("eval/") and key.endswith("/loss") and key != "eval/loss"):
        name = key.removeprefix("eval/").removesuffix("/loss")
        lines.append(f"| held out, {name} | {four_digits(final[key])} | {four_digits(final.get(f'eval/{name}/bpb'))} |")
    if "eval/loss" in final:
        lines.insert(2, f"| held out, all | {four_digits(final['eval/loss'])} | {four_digits(final.get('eval/bpb'))} |")
    return "\n".join(lines)


def _code(training: Place) -> str:
    """The commit that was launched, by the record of the run."""
    code = (read_record(training) or {}).get("code", {})
    if not code.get("commit"):
        return ""
    return f" Code: commit `{code['commit']}`{' with uncommitted changes' if code.get('dirty') else ''}."


def _configuration(config: TrainingStep, export: ExportConfig, fingerprint: str, code: str) -> str:
    told = {"model": config.model.identity(), "train": config.train.identity(), "export": export.identity()}
    return f"Run `{fingerprint[:16]}`.{code}\n\n```json\n{json.dumps(told, indent=1, sort_keys=True)}\n```"
