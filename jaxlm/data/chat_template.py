"""Chat templates: Jinja programs that turn messages into text, where they are found, and one of our own.

A template comes from outside: it runs in jinja2's sandbox and sees plain values only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

from jaxlm.core.config import nearest
from jaxlm.data.tokenizer import JSON_NAMES_FILE, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
# ChatML with the tags that mark what the assistant writes, for models that bring no template.
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('the role is ' ~ message['role'] ~ ', not system, user, assistant or tool') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# ChatML with tools, for models that bring no template and learn to call them: the call syntax of Hermes and Qwen.
_HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ 'These tools can be called:\n<tools>\n' }}{% for tool in tools %}{{ TOOL + '\n' }}{% endfor %}"
    "{{ '</tools>\nA call is one JSON object between tags; a turn may hold several:\n<tool_call>\n"
    '{\"name\": <name>, \"arguments\": <object>}\n</tool_call>'
    "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% set role = message['role'] %}"
    "{% if role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('the role is ' ~ role ~ ', not system, user, assistant or tool') }}{% endif %}"
    "{% if role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": ' + (call['name'] | tojson) + ', \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% elif role == 'tool' %}{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif not (tools and loop.first and role == 'system') %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
HERMES = _HERMES.replace("TOOL", "(tool | tojson)")
# Tools by name only, for small models that learn them from examples: the schemas of twelve tools are 700 tokens.
HERMES_NAMES = _HERMES.replace("TOOL", "(tool['function'] or tool)['name']")
# KORMo's (arXiv 2510.09426; the format is that of its released code). What follows the last user message shows its
# reasoning, or an empty block that the prompt gives (`enable_thinking=False`); earlier turns show their answer alone.
# The model writes the reasoning, `</think>` and the answer. No source shows its tools or system turns: those are as in
# Hermes. A newline that begins an answer goes: in "</think>\n\n" it would be one token, half of it the prompt's.
_THOUGHT = (
    "{{ '<|BOT|>assistant\n' }}{% set reasoning = (message['reasoning_content'] or '') | trim %}"
    "{% set shown = loop.index0 > last.user %}{% set content = (message['content'] or '').lstrip('\n') %}"
    "{% if shown %}{{ '<think>\n' if reasoning else '<think>\n\n</think>\n' }}{% endif %}"
    "{% generation %}{% if shown and reasoning %}{{ reasoning + '\n</think>\n\n' }}{% endif %}{{ content }}")
KORMO = (
    "{% set last = namespace(user=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    + HERMES.replace("<|im_start|>", "<|BOT|>").replace("<|im_end|>", "<|EOT|>").replace(
        "{{ '<|BOT|>assistant\n' }}{% generation %}{{ message['content'] or '' }}", _THOUGHT).replace(
        "{% if add_generation_prompt %}{{ '<|BOT|>assistant\n' }}",
        "{% if add_generation_prompt %}{{ '<|BOT|>assistant\n<think>\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n' }}{% endif %}"))
TEMPLATES = {"chatml": CHATML, "hermes": HERMES, "hermes_names": HERMES_NAMES, "kormo": KORMO}
# Variables that a rendering with marks sets; in any other they are undefined, so print nothing.
OPEN, CLOSE = "jaxlm_generation_open", "jaxlm_generation_close"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, and further variables for it (`enable_thinking` and the like).

    Source: the templates of Hugging Face's transformers, whose additions to Jinja it has. ValueError if it is no Jinja.
    """

    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _compiled(self.source)

    def render(self, messages: Messages, *, add_generation_prompt: bool, tools: Sequence[Any] | None = None,
               now: datetime | None = None, **variables: Any) -> str:
        """The text of the conversation at a time of day. ValueError when the template refuses it, in its own words."""
        given = _plain({**self.variables, **variables, "messages": messages, "tools": tools, "documents": None,
                        "add_generation_prompt": add_generation_prompt})
        try:
            return _compiled(self.source).render(given, strftime_now=(now or datetime.now()).strftime)
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from None

    def files(self) -> dict[str, bytes]:
        """The template as the file that `chat_template_from_files` reads."""
        return {TEMPLATE_FILE: self.source.encode("utf-8")}


def named_template(name: str) -> ChatTemplate | None:
    """One of `TEMPLATES`, or a Jinja file; None for an empty name. ValueError for what is neither."""
    if not name:
        return None
    if name in TEMPLATES:
        return ChatTemplate(TEMPLATES[name])
    if not Path(name).is_file():
        raise ValueError(f"template {name} is neither a file nor one of {', '.join(TEMPLATES)}"
                         f"{nearest(name, TEMPLATES)}")
    return ChatTemplate(Path(name).read_text(encoding="utf-8"))


def load_chat_template(folder: str | Path) -> ChatTemplate | None:
    """The template in a Hugging Face folder (`chat_template.jinja`, else in `tokenizer_config.json`), None without."""
    folder = Path(folder)
    try:
        return chat_template_from_files({name: (folder / name).read_bytes() for name in (TEMPLATE_FILE, JSON_NAMES_FILE)
                                         if (folder / name).is_file()})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def chat_template_from_files(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """As `load_chat_template`, from file names and contents; of several named templates the one called default."""
    if TEMPLATE_FILE in files:
        return ChatTemplate(files[TEMPLATE_FILE].decode("utf-8"))
    try:
        stored = json.loads(files.get(JSON_NAMES_FILE, b"{}")).get("chat_template")
        if isinstance(stored, list):
            stored = {one["name"]: one["template"] for one in stored}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{JSON_NAMES_FILE} is damaged: {error!r}") from None
    if isinstance(stored, dict):
        if "default" not in stored:
            raise ValueError(f"{JSON_NAMES_FILE}: none of its chat templates is called default: {', '.join(stored)}")
        stored = stored["default"]
    if not isinstance(stored, str | None):
        raise ValueError(f"{JSON_NAMES_FILE}: a chat template is a string, not {stored!r:.80}")
    return None if stored is None else ChatTemplate(stored)


def chatml(tokenizer: Tokenizer) -> ChatTemplate:
    """`CHATML`; ValueError if the tokenizer has not both of its special tokens."""
    return _with_symbols(CHATML, tokenizer)


def hermes(tokenizer: Tokenizer) -> ChatTemplate:
    """`HERMES`; ValueError as for `chatml`."""
    return _with_symbols(HERMES, tokenizer)


def hermes_names(tokenizer: Tokenizer) -> ChatTemplate:
    """`HERMES_NAMES`; ValueError as for `chatml`."""
    return _with_symbols(HERMES_NAMES, tokenizer)


def _with_symbols(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    if missing := [name for name in ("<|im_start|>", "<|im_end|>") if name not in tokenizer.symbols]:
        raise ValueError("the model brings no chat template, and its tokenizer lacks what ChatML needs: the special "
                         f"token {' and '.join(missing)}")
    return ChatTemplate(source)


class _Generation(ext.Extension):
    """The tag `{% generation %}`: what the assistant writes, between two variables that marked renderings set."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.Name(name, "load")]) for name in (OPEN, CLOSE))
        return nodes.Scope([before, *body, after]).set_lineno(line)


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=[_Generation, ext.loopcontrols])

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # jinja2's own filter escapes for HTML.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from None


def _plain(value: Any) -> Any:
    """A copy out of JSON's types alone: other objects could give a template methods that the sandbox lets it call."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    raise ValueError(f"a chat template takes JSON's types, not {type(value).__name__}: {value!r:.80}")
