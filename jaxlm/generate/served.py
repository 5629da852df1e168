"""Texts from a server with the OpenAI interface (vLLM, SGLang, llama.cpp and others), `POST URL/chat/completions`.

Retried: no connection, no whole answer in time, status 408, 409, 425, 429 and 5xx, and an answer that is no JSON or
holds no text. Any other status ends the request at once; 401, 403 and 404 are the same for every request and raise.
"""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from jaxlm.generate.settings import SamplingConfig

RETRIED = (408, 409, 425, 429)  # and 5xx
USELESS = (401, 403, 404)       # for every request alike
MAX_BYTES = 2**26               # of an answer
# Fields of SamplingConfig by their names in a request; those of the second line are vLLM's, SGLang's and llama.cpp's.
SENT = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "stop_strings": "stop",
        "frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty", "seed": "seed",
        "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"}
IDS = ("logit_bias", "allowed_tokens", "stop_ids", "ignore_eos")  # of a tokenizer that is not here


@dataclass(frozen=True, kw_only=True)
class ServedConfig:
    """How a server is asked."""

    timeout: float = 120.0       # seconds for one whole answer
    attempts: int = 5            # at each request
    backoff: float = 1.0         # seconds before the second attempt, doubled before each further one, half of it random
    max_backoff: float = 60.0    # also for what the server asks by Retry-After
    concurrency: int = 8         # requests under way
    key_variable: str = ""       # name of the environment variable that holds the key

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and self.backoff >= 0 and self.max_backoff >= 0):
            raise ValueError("served: timeout must be above 0, backoff and max_backoff not negative")
        if min(self.attempts, self.concurrency) < 1:
            raise ValueError("served: attempts and concurrency must be at least 1")


@dataclass(frozen=True)
class Server:
    """A model behind an address; the key does not show."""

    url: str
    model: str
    config: ServedConfig = ServedConfig()

    def __post_init__(self) -> None:
        found = urllib.parse.urlsplit(self.url)
        if found.scheme not in ("http", "https") or not found.hostname:
            raise ValueError(f"{self.url!r} is no address of a server; write http://HOST:PORT/v1#MODEL")
        if found.username or found.password or found.query:
            raise ValueError("the address of a server holds no key: name the variable that holds it by key_variable")
        if not self.model:
            raise ValueError(f"{self.url}: which model? write {self.url}#MODEL")


class Reply(NamedTuple):
    """What came back: a text, or why there is none."""

    text: str
    finish: str          # stop, length or what the server says; "" without a text
    tokens: int          # that the server counted, 0 if it does not
    attempts: int
    error: str = ""


class _Refused(Exception):
    """An attempt without a text. `wait`: seconds that the server asks for; `final`: another attempt is the same."""

    def __init__(self, reason: str, wait: float = 0.0, final: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.final = wait, final


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


# Straight to the server: no proxy of the environment sees prompts.
_OPENER = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))


def check_served(config: ServedConfig, sampling: SamplingConfig) -> None:
    """ValueError for settings that no server follows, and for a key that is not in the environment."""
    defaults = {field.name: field.default for field in fields(SamplingConfig)}
    if odd := [name for name in IDS if getattr(sampling, name) != defaults[name]]:
        raise ValueError(f"sampling.{odd[0]} names tokens, which a server's tokenizer numbers otherwise; drop it")
    _headers(config)


def ask(server: Server, prompt: str, sampling: SamplingConfig,
        sleep: Callable[[float], bool | None] = time.sleep) -> Reply:
    """One text after a user's message. A reply without a text says why; ValueError where every request would fail.

    Args:
      sleep: waits between two attempts; True: there shall be no further one.
    """
    config, reason = server.config, ""
    body = {"model": server.model, "messages": [{"role": "user", "content": prompt}]} | {
        name: value for field, name in SENT.items() if (value := getattr(sampling, field)) not in (None, ())}
    request = urllib.request.Request(f"{server.url.rstrip('/')}/chat/completions", json.dumps(body).encode(),
                                     _headers(config), method="POST")
    for attempt in range(1, config.attempts + 1):
        try:
            return _read(_send(request, config.timeout))._replace(attempts=attempt)
        except _Refused as refused:
            reason = str(refused)
            if refused.final:
                break
            if attempt < config.attempts:
                # Drawn, so that requests which failed together do not come again together.
                wait = config.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1)
                if sleep(min(max(wait, refused.wait), config.max_backoff)):
                    break
    return Reply("", "", 0, attempt, reason)


def ask_all(server: Server, prompts: Sequence[str], sampling: Sequence[SamplingConfig]
            ) -> Iterator[tuple[int, Reply]]:
    """The number of each prompt and its reply, as they come, `concurrency` at a time."""
    pool, stopped = ThreadPoolExecutor(server.config.concurrency), threading.Event()
    try:
        asked = {pool.submit(ask, server, prompt, one, stopped.wait): number
                 for number, (prompt, one) in enumerate(zip(prompts, sampling, strict=True))}
        for done in as_completed(asked):
            yield asked[done], done.result()
    finally:  # an error or an interrupt: what has not begun does not begin
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _headers(config: ServedConfig) -> dict[str, str]:
    found = {"Content-Type": "application/json", "Accept": "application/json"}
    if config.key_variable:
        key = os.environ.get(config.key_variable, "").strip()
        if not key:
            raise ValueError(f"served.key_variable: the environment has no {config.key_variable}")
        if not key.isascii() or not key.isprintable():
            raise ValueError(f"served.key_variable: {config.key_variable} holds characters that no key has")
        found["Authorization"] = f"Bearer {key}"
    return found


def _send(request: urllib.request.Request, timeout: float) -> bytes:
    """The whole answer, before the time is over though it may drip."""
    deadline = time.monotonic() + timeout
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            parts, size = [], 0
            while part := response.read1(2**16):
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise TimeoutError
                if size > MAX_BYTES:
                    raise _Refused(f"the answer is longer than {MAX_BYTES} bytes", final=True)
            return b"".join(parts)
    except urllib.error.HTTPError as error:
        with error:
            code, wait = error.code, error.headers.get("Retry-After") or ""
        if code in USELESS:
            raise ValueError(f"{request.full_url} answers {code} ({error.reason}): check the address, the model and "
                             "the key") from None
        again = code in RETRIED or code >= 500
        raise _Refused(f"status {code} ({error.reason})", float(wait) if wait.isdecimal() else 0.0, not again) from None
    except TimeoutError:
        raise _Refused(f"no whole answer in {timeout:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise _Refused(f"no whole answer in {timeout:g} seconds") from None
        raise _Refused(f"no answer: {cause}") from None


def _read(content: bytes) -> Reply:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise _Refused(f"the answer is no JSON: {content[:80]!r}") from None
    try:
        choice = found["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason") or "stop"
        usage = found.get("usage") or {}
        tokens = usage.get("completion_tokens") or 0
    except (LookupError, TypeError, AttributeError):
        raise _Refused(f"the answer holds no choices[0].message.content: {content[:80]!r}") from None
    if not isinstance(text, str) or not text.strip():
        raise _Refused("the answer holds an empty text")
    return Reply(text, str(finish), tokens if isinstance(tokens, int) else 0, 1)
