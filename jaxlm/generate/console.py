"""Texts on a terminal: streamed, in order, or as a conversation."""

import logging
from collections.abc import Iterable, Iterator, Sequence

from jaxlm.generate.engine import Engine, serve
from jaxlm.generate.prompts import Ask, Prompt, Reader, make_asks
from jaxlm.generate.requests import Piece, Report
from jaxlm.generate.settings import SamplingConfig

log = logging.getLogger(__name__)


def show(engine: Engine, asks: Sequence[Ask], report: Report) -> None:
    """Texts to standard output: a single one as it comes, several in order, each under its prompt."""
    if len(asks) == 1:
        say(engine, asks[0], report)
        return
    waiting: dict[int, str] = {}
    shown = 0
    for one in serve(engine, [ask.ids for ask in asks], [ask.sampling for ask in asks], report=report):
        waiting[one.prompt] = one.text
        while shown in waiting:
            ask = asks[shown]
            said = ask.prompt.text or str(ask.prompt.messages[-1].get("content", ""))
            name = f"{ask.number}.{ask.sample}" if ask.sample or asks[-1].sample else f"{ask.number}"
            print(f"[{name}] {' '.join(said.split())[:80]}\n{waiting.pop(shown)}\n", flush=True)
            shown += 1


def say(engine: Engine, ask: Ask, report: Report) -> str:
    """One text, printed as it comes."""
    text, cut = "", False
    try:
        for event in serve(engine, [ask.ids], ask.sampling, pieces=True, report=report):
            if isinstance(event, Piece):
                text += event.text
                print(event.text, end="", flush=True)
            else:
                cut = event.reason == "length"
    finally:
        print(flush=True)
    if cut:
        log.info("(ends here by --sampling.max-new-tokens %d)", ask.sampling.max_new_tokens)
    return text


def converse(engine: Engine, reader: Reader, sampling: SamplingConfig, lines: Iterable[str], report: Report) -> None:
    """Answers line by line; in a chat with all that was said before. Interrupting ends an answer, not the program."""
    history: list[dict[str, str]] = []
    for line in lines:
        said = [*history, {"role": "user", "content": line}]
        prompt = Prompt(messages=said, where="the conversation") if reader.chat else Prompt(line)
        try:
            text = say(engine, make_asks(reader, [prompt], sampling)[0], report)
        except ValueError as error:
            log.warning("%s", error)
        except KeyboardInterrupt:
            log.info("(interrupted; this question is forgotten)")
        else:
            history = [*said, {"role": "assistant", "content": text}]


def typed() -> Iterator[str]:
    """Lines that a person types, up to an empty one or the end."""
    log.info("an empty line ends")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line.strip():
            return
        yield line
