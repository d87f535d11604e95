"""The pages `reference/*.md`: every field of every configuration class, read from the classes as mkdocs builds the site.

mkdocs calls `on_files` (`hooks` in mkdocs.yml); `python docs/reference_pages.py` prints the pages.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments.tpu.form import SliceFields
from model.config import LlamaConfig
from model.config_base import Config
from model.train_config import SimpleTrainConfig
from tasks.config import RunConfig
from tasks.mixture_config import Mixture

HOW_TO_READ = (
    "*identity* fields decide the result: with another value it is another run. *runtime* ones may change between attempts. "
    "On the command line `train.num_train_steps` is `--train.num-train-steps`."
)
IN_THE_FORM = "Variables of a work pool of type `tpu`, and `job_variables` of a deployment on it. None of them is part of a run's identity."

# page: title, what stands before the tables, the classes it is about; what these hold is put on the first page that needs it
PAGES: dict[str, tuple[str, str, tuple[type[BaseModel], ...]]] = {
    "reference/model.md": ("Model", HOW_TO_READ, (LlamaConfig,)),
    "reference/training.md": ("Training", HOW_TO_READ, (SimpleTrainConfig,)),
    "reference/data.md": ("Data and tokenizers", HOW_TO_READ, (Mixture,)),
    "reference/run.md": ("A whole run", HOW_TO_READ, (RunConfig,)),
    "reference/tpu.md": ("The TPU work pool", IN_THE_FORM, (SliceFields,)),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to the site."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Every page's Markdown by its path below docs/."""
    done: set[type[BaseModel]] = set()
    found: dict[str, str] = {}
    for path, (title, before, roots) in PAGES.items():
        classes = [each for root in roots for each in with_nested(root) if each not in done]
        done.update(classes)
        found[path] = "\n\n".join([f"# {title}", before, *map(class_section, classes)]) + "\n"
    return found


def with_nested(root: type[BaseModel]) -> list[type[BaseModel]]:
    """The class and those that its fields hold, each once, in the order of the fields."""
    found = [root]
    for each in found:
        for field in each.model_fields.values():
            found += [inner for inner in models_in(field.annotation) if inner not in found]
    return found


def models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """Configuration classes that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def class_section(form: type[BaseModel]) -> str:
    """A heading, what the class is, and a table of its fields."""
    identity = issubclass(form, Config)
    columns = ["field", "type", "default", *(["part of"] if identity else []), "meaning"]
    rows = [columns, ["---"] * len(columns), *(field_row(name, field, identity) for name, field in form.model_fields.items())]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    about = " ".join((form.__doc__ or "").split("\n\n")[0].split())
    return f"## {form.__name__}\n\n{about}\n\n{table}"


def field_row(name: str, field: FieldInfo, identity: bool) -> list[str]:
    """The cells of one field."""
    extra = field.json_schema_extra
    part = "runtime" if isinstance(extra, dict) and extra.get("runtime") else "identity"
    default = "*required*" if field.is_required() else code(shown(field.get_default(call_default_factory=True)))
    bounds = ", ".join(filter(None, (bound_text(each) for each in field.metadata)))
    kind = code(type_text(field.annotation)) + (f", {bounds}" if bounds else "")
    cells = [code(name), kind, default, *([part] if identity else []), field.description or ""]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def bound_text(constraint: Any) -> str:
    """`>= 1` for a bound that pydantic checks; empty for anything else."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
    return next((f"{sign} {getattr(constraint, name):,}" for name, sign in signs.items() if hasattr(constraint, name)), "")


def type_text(annotation: Any) -> str:
    """A type as a person writes it: `int | None`, `dict[str, float]`, the choices of a literal."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    if origin is Annotated:
        return type_text(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_text, parts))
    return f"{type_text(origin)}[{', '.join(map(type_text, parts))}]"


def shown(value: Any) -> str:
    """A default as Python writes it; of a configuration, what it does not have by default itself."""
    if isinstance(value, BaseModel):
        changed = {name: getattr(value, name) for name in value.model_fields_set if name != "kind"}
        return f"{type(value).__name__}({', '.join(f'{name}={each!r}' for name, each in changed.items())})"
    return repr(value)


def code(text: str) -> str:
    """Text as code of one line."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    print("\n".join(pages().values()))
