"""Renders conversations by a Jinja chat template into text, control tokens, and what of it has to be learned.

Templates are those of Hugging Face tokenizers (transformers, `chat_template_utils`): the same sandbox, whitespace rules, filters
and `{% generation %}` blocks. Two things differ. The date is not to be had, since ids must not depend on it. And only what the
template itself writes becomes a control token: the same characters in a message are marked before the template sees them, and
so stay text where the template joins them with its own. (Not covered: a template that writes the beginning of a control token and
right after it a message from whose beginning it has removed characters.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tasks.sources import DataError

# Plain text: `role: content` lines, in which the assistant's content and the line's end are learned.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_REMEDY = "put {% generation %} and {% endgeneration %} around what the assistant says in answers.template, or leave it out for plain text"
_OPEN, _CLOSE = "generation_begins_here", "generation_ends_here"
# Roles that templates know, and may write as a part of a control token.
_USUAL_ROLES = frozenset(
    ("assistant", "developer", "environment", "function", "ipython", "model", "observation", "system", "tool", "tool_call", "user")
)
_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class UnusableConversation(DataError):
    """A conversation that its template refuses, or that would pass a control token off as a role."""


class Piece(NamedTuple):
    """A part of a rendered conversation: text, or the id of a control token; and whether it has to be learned."""

    text: str
    token: int | None
    is_learned: bool


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: writes a mark before and after its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statement's nodes."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(name: str) -> nodes.Node:
            return nodes.Output([nodes.Name(name, "load")]).set_lineno(line)

        return [mark(_OPEN), nodes.Scope(body).set_lineno(line), mark(_CLOSE)]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as transformers has it. Never ASCII alone: the marks in a message would be spelt out."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compiled(source: str, *, for_training: bool = True) -> tuple[Any, tuple[str, ...]]:
    """The template, and the strings that are written in it. Raises DataError, see check_template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        tree = environment.parse(source)
        template = environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(f"answers.template line {error.lineno} is no Jinja ({error.message}); correct it") from None
    if for_training and not any(name.name == _OPEN for name in tree.find_all(nodes.Name)):
        raise DataError(f"answers.template does not say which part the assistant has to learn; {_REMEDY}")
    strings = tuple(sorted({constant.value for constant in tree.find_all(nodes.Const) if isinstance(constant.value, str)}))
    return template, strings


def check_template(source: str | None) -> None:
    """Raises DataError for a template that is no Jinja, or has no `{% generation %}` block, with the remedy."""
    _compiled(DEFAULT_TEMPLATE if source is None else source)


class _Marks:
    """Characters that are neither in the conversation nor in the template, and what they stand for."""

    def __init__(self, taken: str) -> None:
        used = set(taken)
        self._free = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)
        self.open, self.close, self.nothing = self.one(), self.one(), self.one()

    def one(self) -> str:
        """A character not given before. Raises UnusableConversation where every one is taken."""
        mark = next(self._free, None)
        if mark is None:
            raise UnusableConversation("a conversation uses every private-use character there is; leave it out")
        return mark


@lru_cache(maxsize=64)
def _firsts_pattern(controls: tuple[str, ...], strings: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first characters of control tokens, and as group 1 what a template may look for that only begins like one.

    A template may cut a message at "</think>" while "<|end|>" is a control token: the message keeps the former as it is.
    """
    firsts = {text[0] for text in controls}
    spared: set[str] = set()
    for string in strings:
        starts = [*(index for index, sign in enumerate(string) if sign in firsts), len(string)]
        spared.update(string[start:end] for start, end in pairwise(starts))
    spared = {text for text in spared if not any(text.startswith(control) or control.startswith(text) for control in controls)}
    kept = "|".join(map(re.escape, sorted(spared, key=len, reverse=True))) or "(?!)"
    return re.compile(f"({kept})|[{''.join(map(re.escape, sorted(firsts)))}]", re.DOTALL)


def _continues(text: str, controls: Sequence[str]) -> bool:
    """Whether, right after something else, the text's beginning can be the end or the middle of a control token."""
    if not text:
        return False
    return any(text in control or any(text.startswith(control[start:]) for start in range(1, len(control))) for control in controls)


def _check_role(role: str, controls: Sequence[str]) -> None:
    if role in _USUAL_ROLES:
        return
    if found := next((control for control in controls if control in role or role in control), None):
        raise UnusableConversation(
            f"a message has the role {role[:80]!r}, which a template could make the control token {found!r}; rename the role"
        )


def render_conversation(
    messages: Sequence[Mapping[str, str]],
    template: str | None,
    special_tokens: Mapping[str, int],
    bos_id: int | None,
    eos_id: int,
    *,
    for_training: bool = True,
    add_generation_prompt: bool = False,
) -> list[Piece]:
    """The conversation as the template writes it, in pieces, none empty, neighbouring texts apart where learning begins or ends.

    messages: {"role", "content"} each. for_training: the template has to say what is learned. add_generation_prompt: end with what
    the assistant's next answer begins after. Raises DataError for the template, UnusableConversation for the conversation.
    """
    compiled, strings = _compiled(DEFAULT_TEMPLATE if template is None else template, for_training=for_training)
    controls = tuple(sorted((text for text in special_tokens if text), key=lambda text: (-len(text), text)))
    words = [message[part] for message in messages for part in ("role", "content")]
    marks = _Marks("".join((*words, *strings, *controls, template or "")))
    tokens = {text: special_tokens[text] for text in controls}
    bos, eos = (_text_of(token, tokens, marks) for token in (bos_id, eos_id))
    swapped = {sign: marks.one() for sign in sorted({text[0] for text in controls})}
    for message in messages:
        _check_role(message["role"], controls)
    shown = [
        {"role": message["role"], "content": _protected(message["content"], controls, strings, swapped, marks.nothing)}
        for message in messages
    ]
    try:
        text = compiled.render(
            messages=shown,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=add_generation_prompt,
            **{_OPEN: marks.open, _CLOSE: marks.close},
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise UnusableConversation(
            f"answers.template does not take a conversation ({str(error)[:200]}); leave it out or correct it"
        ) from None
    back = str.maketrans({mark: sign for sign, mark in swapped.items()} | {marks.nothing: None})
    return list(_pieces(text, tokens, marks, back))


def _text_of(token: int | None, tokens: dict[str, int], marks: _Marks) -> str:
    """The text that stands for a token in the template; one is made up where the vocabulary has none."""
    if token is None:
        return ""
    text = next((text for text, number in tokens.items() if number == token), None)
    if text is None:
        text = marks.one()
        tokens[text] = token
    return text


def _protected(content: str, controls: tuple[str, ...], strings: tuple[str, ...], swapped: Mapping[str, str], nothing: str) -> str:
    """The content with marks in it, so that no control token can begin, end or lie in it."""
    if not controls:
        return content
    content = _firsts_pattern(controls, strings).sub(lambda found: found[0] if found[1] else swapped[found[0]], content)
    begin = len(content) - len(content.lstrip())
    return f"{content[:begin]}{nothing}{content[begin:]}" if _continues(content.strip(), controls) else content


def _pieces(text: str, tokens: Mapping[str, int], marks: _Marks, back: Mapping[int, Any]) -> Iterator[Piece]:
    found = re.compile("|".join(map(re.escape, (marks.open, marks.close, *tokens))))
    is_learned, position = False, 0
    for match in chain(found.finditer(text), [None]):
        if plain := text[position : match.start() if match else None].translate(back):
            yield Piece(plain, None, is_learned)
        if match is None:
            return
        position = match.end()
        if match[0] in (marks.open, marks.close):
            is_learned = match[0] == marks.open
        else:
            yield Piece("", tokens[match[0]], is_learned)
