"""HTTP with an OpenAI-compatible server: checks before anything is sent, and whole answers within a deadline."""

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from rsrlm.settings.base import ConfigError
from rsrlm.settings.machine import Endpoint as EndpointConfig

MOST_BYTES = 16 << 20  # of an answer; those of judges have some kilobytes
OF_THE_TRANSFER = frozenset({"content-encoding", "content-length", "transfer-encoding"})  # and not of the answer


class ChatMessage(BaseModel):
    content: str | None = None


class ChatChoice(BaseModel):
    message: ChatMessage
    finish_reason: str | None = None


class Tokens(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class ChatAnswer(BaseModel):
    """A chat completion as far as it is used. The library does not check what it parses."""

    choices: list[ChatChoice] = Field(min_length=1)
    usage: Tokens | None = None


async def whole_answer(send: Any, request: Any, timeout_s: float, masked: Callable[[str], str]) -> Any:
    """The answer to one request, read to its end within `timeout_s`, however slowly the bytes come.

    One that succeeded but is no chat completion, or is too long, counts as a failed transfer: gateways answer like this
    when the server behind them fails. The openai library tries again after these. `masked` hides the key in messages.
    """
    import httpx2

    try:
        async with asyncio.timeout(timeout_s):
            response = await send(request, stream=True)
            try:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        raise httpx2.DecodingError(f"an answer of over {MOST_BYTES} bytes", request=request)
            finally:
                await response.aclose()
    except TimeoutError:
        raise httpx2.ReadTimeout("no whole answer", request=request) from None
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in OF_THE_TRANSFER]
    whole = httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)
    if whole.is_success:
        try:
            ChatAnswer.model_validate_json(whole.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            message = f"no chat completion ({where}: {first['msg']}): {masked(whole.text)[:200]!r}"
            raise httpx2.DecodingError(message, request=request) from None
    return whole


@contextlib.contextmanager
def no_openai_variables() -> Iterator[None]:
    """The library would send the organization, project and headers in them (and the key, without another) to any
    server; what is sent is what the config says."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check_endpoint(config: EndpointConfig, name: str) -> None:
    """Raises ConfigError for a url or a budget that cannot be used; `name` is the config's key, for messages."""
    try:
        url = urlsplit(config.url)
        _ = url.port  # raises where it is no number
    except ValueError:
        url = urlsplit("")
    if url.username or url.password or url.query:
        raise ConfigError(
            f"{name}.url: holds a user name, password or query, which would show in messages; write the bare url, and "
            f"name an environment variable with the key in {name}.key_env"
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"{name}.url={config.url!r}: no http url; write one such as http://localhost:8000/v1")
    if config.max_cost is not None and not config.price_in and not config.price_out:
        raise ConfigError(
            f"{name}.max_cost={config.max_cost:g}: nothing has a price, so it would never be reached; set "
            f"{name}.price_in and {name}.price_out (per million tokens), or leave {name}.max_cost out"
        )


def key_of(variable: str | None, name: str) -> str:
    """The key in an environment variable; "" without a variable. Raises ConfigError."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()  # files of secrets end in a newline
    if not key:
        # A key in place of the name is a likely mistake, and must not be shown.
        shown = variable if re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) else "..."
        raise ConfigError(
            f"{name}.key_env={shown}: this environment variable is not set or empty; export it where rsrlm starts, "
            f"write its name and not the key itself, or set {name}.key_env=null for a server without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{name}.key_env={variable}: the key in it has characters that no HTTP header may have; correct it"
        )
    return key
