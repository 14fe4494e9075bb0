"""An endpoint against a real HTTP server on this machine that answers by a script."""

import asyncio
import contextlib
import json
import os
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web

from rsrlm.judges.verdicts import CUT, parse_points
from rsrlm.records import Completion, Request, Sampling, Scored, Unparsed
from rsrlm.runtime.endpoint import BudgetSpent, EndpointClient, EndpointConfig, EndpointFailed, EndpointPool
from rsrlm.settings.base import ConfigError

SECRET = "sk-test-0123456789abcdef"
PLAIN = Sampling(temperature=0.7, top_p=1.0, max_tokens=100, seed=2**63 - 1)
SOON = {"retry-after-ms": "10"}  # the server's own request; the library's first delay is half a second otherwise


@dataclass(frozen=True)
class Say:
    """One scripted answer; `body` is sent as it is where it is a string. status 0 drops the connection."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Seen:
    """What the server saw of a request, and when."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float


@dataclass
class Server:
    url: str
    script: list[Say]
    requests: list[Seen] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


def chat(text: str | None = "Score: 4", finish: str | None = "stop", usage: Any = (1000, 50), **more: Any) -> Say:
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m-2026"}
    body["choices"] = [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}]
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    if usage is not None:
        body["usage"] = usage
    return Say(body, **more)


def error(status: int, message: str, code: str | None = None, **more: Any) -> Say:
    return Say({"error": {"message": message, "type": "t", "param": None, "code": code}}, status, **more)


@asynccontextmanager
async def serving(script: Sequence[Say]) -> AsyncIterator[Server]:
    """Answers in order, the last one again and again. `{auth}` in a body becomes the Authorization header."""
    server = Server("", list(script))

    async def handle(request: web.Request) -> web.Response:
        server.requests.append(Seen(await request.json(), dict(request.headers), time.monotonic()))
        say = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        server.running += 1
        server.most_running = max(server.most_running, server.running)
        try:
            await asyncio.sleep(say.delay)
        finally:
            server.running -= 1
        if say.status == 0:
            assert request.transport is not None
            request.transport.abort()
        body = say.body if isinstance(say.body, str) else json.dumps(say.body)
        body = body.replace("{auth}", request.headers["Authorization"])
        return web.Response(text=body, status=say.status or 200, headers=say.headers, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


def talk(
    script: Sequence[Say], work: Callable[[EndpointClient, Server], Awaitable[Any]], spent: float = 0.0, **settings: Any
) -> Any:
    """Run `work` with an endpoint before a server with this script."""

    async def main() -> Any:
        async with serving(script) as server:
            given: dict[str, Any] = {"url": server.url, "model": "m", "key_env": "TEST_KEY", "max_retries": 2}
            config = EndpointConfig(**given | settings)
            endpoint = EndpointClient(config, spent)
            try:
                return await work(endpoint, server)
            finally:
                await endpoint.close()

    return asyncio.run(main())


async def one(endpoint: EndpointClient, server: Server) -> tuple[Completion, dict[str, float], Server]:
    return await endpoint.ask("00/tea/2#1", "Judge this.", PLAIN), endpoint.stats(), server


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_an_answer_and_its_request() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    found, stats, server = talk([chat(usage=usage)], one, price_in=2.0, price_out=10.0)
    assert found == Completion(
        request_id="00/tea/2#1",
        token_ids=(),
        text="Score: 4",
        finish_reason="stop",
        weight_version="endpoint:m",
    )
    (seen,) = server.requests
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Judge this."}],
        "temperature": 0.7,
        "max_tokens": 100,
        "seed": 2**63 - 1,
    }
    assert seen.headers["Authorization"] == f"Bearer {SECRET}"
    # 1000 tokens at 2 and 50 at 10 per million
    assert stats == {
        "requests": 1, "retries": 0, "prompt_tokens": 1000, "completion_tokens": 50, "cost": pytest.approx(0.0025),
        "unmetered": 0, "withheld": 0,
    }  # fmt: skip


def test_filters_are_sent_where_they_are_on() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> Any:
        await endpoint.ask("a", "hi", replace(PLAIN, top_p=0.9, temperature=0.0))
        return server.requests[0].body

    body = talk([chat()], work)
    assert (body["top_p"], body["temperature"]) == (0.9, 0.0)


def test_a_pool_of_one_server_answers_in_order_and_notes_what_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsrlm.runtime.endpoint.NOTED_EVERY_S", 0.0)
    noted: list[float] = []

    async def work(endpoint: EndpointClient, server: Server) -> Any:
        pool = EndpointPool(endpoint, lambda: noted.append(endpoint.stats()["requests"]))
        requests = [
            Request(id=str(number), prompt_token_ids=(), sampling=PLAIN, priority=0, text=f"Judge {number}.")
            for number in range(3)
        ]
        assert pool.slots == 1
        return await pool.generate_all(requests), server.requests

    script = [chat("Score: 1"), chat("Score: 2"), chat("Score: 3")]
    found, seen = talk(script, work, max_concurrent=1)
    assert [(one.request_id, one.text) for one in found] == [("0", "Score: 1"), ("1", "Score: 2"), ("2", "Score: 3")]
    assert [one.body["messages"][0]["content"] for one in seen] == ["Judge 0.", "Judge 1.", "Judge 2."]
    assert noted == [1, 2, 3]


def test_stop_strings_are_sent() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> Any:
        await endpoint.ask("a", "hi", replace(PLAIN, stop=("\n", "Question:")))
        return server.requests[0].body

    assert talk([chat()], work)["stop"] == ["\n", "Question:"]


def test_newer_openai_models_name_the_limit_otherwise() -> None:
    """Asked once with the old name, and with the new one from then on."""
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )

    async def work(endpoint: EndpointClient, server: Server) -> Any:
        for _ in range(2):
            await endpoint.ask("a", "hi", PLAIN)
        return [sorted({"max_tokens", "max_completion_tokens"} & set(seen.body)) for seen in server.requests]

    script = [error(400, message, "unsupported_parameter"), chat()]
    assert talk(script, work) == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]
    with pytest.raises(ConfigError, match="max_completion_tokens"):  # a server that refuses both is not asked for ever
        talk([error(400, message, "unsupported_parameter")], one)


@pytest.mark.parametrize(
    ("say", "text", "finish", "verdict"),
    [
        (chat("Good.\nScore: 4"), "Good.\nScore: 4", "stop", Scored(points=4.0)),
        (chat("Good.\nScore: 4", "length"), "Good.\nScore: 4", "length", CUT),
        (chat("Score: 4 because", "length"), "Score: 4 because", "length", CUT),
        (chat(None), "", "stop", Unparsed(reason="no score line")),  # a refusal, or thought without an answer
        (chat("Score: 4. It", "content_filter"), "", "length", CUT),
        (chat("Score: 4", "tool_calls"), "", "length", CUT),
        (chat("Score: 4", None), "", "length", CUT),
        (chat("Score: 4", "eos"), "", "length", CUT),
        (error(400, "The response was filtered", "content_filter"), "", "length", CUT),
        (error(400, "This model's maximum context length is 2048 tokens"), "", "length", CUT),
    ],
)
def test_only_what_the_model_ended_is_a_complete_answer(say: Say, text: str, finish: str, verdict: object) -> None:
    found, stats, _ = talk([say], one)
    assert (found.text, found.finish_reason) == (text, finish)
    assert parse_points(found.text, found.finish_reason) == verdict
    assert stats["withheld"] == (text == "" and finish == "length")
    assert stats["prompt_tokens"] == (1000 if say.status == 200 else 0)  # what was kept back is paid for all the same


def test_retry_after_is_honoured() -> None:
    found, stats, server = talk([error(429, "slow down", headers={"Retry-After": "1"}), chat()], one)
    assert found.text == "Score: 4"
    first, second = server.requests
    assert second.at - first.at >= 0.95  # without the header at most 0.5
    assert (stats["requests"], stats["retries"]) == (2, 1)


@pytest.mark.parametrize(
    "passing",
    [Say("", 0), Say('{"choices": [{"mess'), Say({"error": {"message": "upstream is down"}}), chat(delay=5.0)],
    ids=["dropped", "cut", "error-as-200", "slow"],
)
def test_what_passes_is_tried_again(passing: Say) -> None:
    found, stats, _ = talk([passing, chat()], one, timeout_s=1.0)
    assert found.text == "Score: 4"
    assert (stats["requests"], stats["retries"], stats["prompt_tokens"]) == (2, 1, 1000)


def test_a_server_that_stays_down() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> Any:
        with pytest.raises(EndpointFailed) as raised:
            await endpoint.ask("a", "hi", PLAIN)
        return str(raised.value), len(server.requests), endpoint.stats(), server.url

    message, requests, stats, url = talk([error(500, "no GPU left", headers=SOON)], work)
    assert requests == stats["requests"] == 3
    assert stats["retries"] == 2
    for part in (url, "no GPU left", "judge.endpoint.max_retries=2", "resume"):
        assert part in message


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        (error(429, "You exceeded your quota"), "quota; if this is its rate limit, lower judge.endpoint.requests_per"),
        (Say("<html>bad gateway", 502), "502 <html>bad gateway"),
        (Say("", 0), "disconnected"),
        (error(500, "a\x1b[2Jb\x07\u202ec\r\n"), "a [2Jb  c"),
        (chat(delay=5.0), "no whole answer in judge.endpoint.timeout_s=1 seconds"),
        (Say(""), "no chat completion"),
        (Say("<html>welcome"), "<html>welcome"),
        (Say('"a string"'), "no chat completion"),
        (Say("null"), "no chat completion"),
        (Say({"choices": []}), "choices: List should have at least 1 item"),
        (Say({"choices": None}), "no chat completion"),
        (Say({"choices": [{"text": "Score: 4", "finish_reason": "stop"}]}), "choices.0.message"),
        (chat(["Score: 4"]), "choices.0.message.content"),  # type: ignore[arg-type]
        (chat("\ud800"), "Invalid JSON"),  # could not be written to a record
        (chat(usage={"prompt_tokens": -(10**6), "completion_tokens": 1}), "usage.prompt_tokens"),  # nor lower the cost
    ],
)
def test_no_usable_answer(say: Say, reason: str) -> None:
    with pytest.raises(EndpointFailed) as raised:
        talk([say], one, max_retries=0, timeout_s=1.0)
    assert reason in str(raised.value)


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_has_a_longest_length(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsrlm.runtime.endpoint_http.MOST_BYTES", 1000)
    assert talk([chat("Score: 4" + " " * 500)], one)[0].finish_reason == "stop"
    with pytest.raises(EndpointFailed, match="an answer of over 1000 bytes"):
        talk([replace(chat("Score: 4" + " " * 1000), status=status)], one, max_retries=0)


def test_an_answer_that_drips_has_a_deadline() -> None:
    """A byte comes within every timeout_s; the answer never does."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)

    async def main() -> str:
        async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            endpoint = EndpointClient(EndpointConfig(url=url, model="m", max_retries=1, timeout_s=0.5))
            with pytest.raises(EndpointFailed) as raised:
                await asyncio.wait_for(endpoint.ask("a", "hi", PLAIN), 20)
            assert endpoint.stats()["requests"] == 2
            await endpoint.close()
            return str(raised.value)

    assert "no whole answer in judge.endpoint.timeout_s=0.5 seconds" in asyncio.run(main())


def test_the_wait_for_a_turn_is_no_part_of_the_deadline() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> int:
        await asyncio.gather(*(endpoint.ask(str(number), "hi", PLAIN) for number in range(4)))
        return len(server.requests)

    # The last one waits for 1.5 seconds.
    assert talk([chat()], work, requests_per_minute=120, timeout_s=1.0, max_retries=0) == 4


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_server_does_not_control_the_terminal(status: int) -> None:
    with pytest.raises((ConfigError, EndpointFailed)) as raised:
        talk([Say("\x1b]0;title\x07\x1b[31mred\x9b2J", status)], one, max_retries=0)
    assert "red" in str(raised.value)
    assert str(raised.value).isprintable()


def test_nobody_listens() -> None:
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(EndpointFailed, match=f"judge.endpoint.url={url}: .*[Cc]onnect"):
            talk([chat()], one, url=url, max_retries=0)


@pytest.mark.parametrize(
    ("status", "keys"),
    [
        (401, ["judge.endpoint.key_env=TEST_KEY", "environment variable"]),
        (403, ["judge.endpoint.key_env=TEST_KEY", "'m'"]),
        (404, ["judge.endpoint.model='m'", "judge.endpoint.url=http://127.0.0.1", "/chat/completions"]),
        (400, ["judge.endpoint", "sampling parameters"]),
        (422, ["judge.endpoint", "sampling parameters"]),
    ],
)
def test_refusals_are_the_users_to_mend(status: int, keys: list[str]) -> None:
    async def work(endpoint: EndpointClient, server: Server) -> tuple[str, int]:
        with pytest.raises(ConfigError) as raised:
            await endpoint.ask("a", "hi", PLAIN)
        return str(raised.value), len(server.requests)

    message, requests = talk([error(status, "The server's own words")], work)
    assert requests == 1
    assert all(key in message for key in [*keys, "The server's own words"])


def test_a_url_with_the_whole_path_is_named() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> None:
        wrong = EndpointClient(EndpointConfig(url=f"{server.url}/chat/completions", model="m"))
        with pytest.raises(ConfigError, match="the url ends before /chat/completions"):
            await wrong.ask("a", "hi", PLAIN)
        await wrong.close()
        assert not server.requests

    talk([chat()], work)


@pytest.mark.parametrize("status", [200, 200.1, 400, 401, 404, 429, 500])
def test_the_key_is_shown_nowhere(status: float, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the server repeats; 200 is a text with it, 200.1 a body that is no completion."""
    caplog.set_level("DEBUG")
    script = [
        chat("Score: 4 {auth}") if status == 200 else Say({"error": {"message": "x" * 150 + "{auth}"}}, int(status))
    ]

    async def work(endpoint: EndpointClient, server: Server) -> list[str]:
        shown = [repr(endpoint), str(endpoint.stats()), repr(endpoint.usage)]
        try:
            shown.append(str(asdict(await endpoint.ask("a", "hi", PLAIN))))
        except (ConfigError, EndpointFailed) as failure:
            shown += [str(failure), repr(failure), "".join(traceback.format_exception(failure))]
        assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"
        return shown

    shown = talk(script, work, max_retries=0)
    assert any("[key]" in text for text in shown)
    for text in [*shown, caplog.text]:
        assert SECRET[:12] not in text


def test_a_placeholder_key_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masking it would change what the judge wrote."""
    monkeypatch.setenv("TEST_KEY", "4")
    found, _, server = talk([chat("Score: 4")], one)
    assert found.text == "Score: 4"
    assert server.requests[0].headers["Authorization"] == "Bearer 4"


def test_without_key_env_no_other_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    _, _, server = talk([chat()], one, key_env=None)
    assert SECRET not in str(server.requests[0].headers)


def test_nothing_of_openais_variables_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for OpenAI's own server, and the library reads them for all."""
    private = "of-another-server"
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", private)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Gateway: {private}\nAuthorization: Bearer {private}")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{private}/v1")
    _, _, server = talk([chat()], one)
    headers = server.requests[0].headers
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert private not in str(headers)
    assert not {name for name in headers if name.lower().startswith("openai-")}
    assert os.environ["OPENAI_ORG_ID"] == private  # for others in this process


def test_a_key_file_ends_in_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", f"{SECRET}\n")
    _, _, server = talk([chat()], one)
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("settings", "key", "hidden"),
    [
        ({"key_env": "NO_SUCH_KEY"}, "judge.endpoint.key_env=NO_SUCH_KEY", "-"),
        ({"key_env": "EMPTY_KEY"}, "judge.endpoint.key_env=EMPTY_KEY", "-"),
        ({"key_env": "ODD_KEY"}, "judge.endpoint.key_env=ODD_KEY", "clé"),
        ({"key_env": SECRET}, "not the key itself", SECRET),
        ({"url": "https://me:hunter2@host/v1"}, "judge.endpoint.url", "hunter2"),
        ({"url": "https://host/v1?key=hunter2"}, "judge.endpoint.url", "hunter2"),
        ({"url": "localhost:8000/v1"}, "judge.endpoint.url='localhost:8000/v1'", "-"),
        ({"url": "http://host:port/v1"}, "judge.endpoint.url='http://host:port/v1'", "-"),
        ({"url": "http://[::1/v1"}, "judge.endpoint.url", "-"),
        ({"url": ""}, "judge.endpoint.url=''", "-"),
        ({"max_cost": 5.0}, "judge.endpoint.max_cost=5", "-"),
    ],
)
def test_mistakes_before_anything_starts(
    settings: dict[str, Any], key: str, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY_KEY", " ")
    monkeypatch.setenv("ODD_KEY", "clé-clé-clé")
    with pytest.raises(ConfigError) as raised:
        EndpointClient(EndpointConfig(**{"url": "http://host/v1", "model": "m"} | settings))
    assert key in str(raised.value)
    assert hidden == "-" or hidden not in str(raised.value)


def test_no_more_than_max_concurrent() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> Any:
        found = await asyncio.gather(*(endpoint.ask(str(index), "hi", PLAIN) for index in range(20)))
        return [completion.request_id for completion in found], server.most_running, endpoint.slots

    # The failure in between must give its place back.
    script = [chat(delay=0.02)] * 5 + [error(500, "once", headers=SOON), chat(delay=0.02)]
    ids, most, slots = talk(script, work, max_concurrent=3)
    assert ids == [str(index) for index in range(20)]
    assert most == slots == 3


def test_requests_per_minute_counts_retries() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> list[float]:
        await asyncio.gather(*(endpoint.ask(str(index), "hi", PLAIN) for index in range(4)))
        return [seen.at for seen in server.requests]

    times = talk([error(500, "once", headers=SOON), chat()], work, requests_per_minute=300)
    assert len(times) == 5
    assert times[-1] - times[0] >= 0.7  # 300 a minute: one in 0.2 s, the first at once


def test_the_budget_stops_before_the_next_request() -> None:
    async def work(endpoint: EndpointClient, server: Server) -> Any:
        for _ in range(3):
            await endpoint.ask("a", "hi", PLAIN)
        with pytest.raises(BudgetSpent) as raised:
            await endpoint.ask("a", "hi", PLAIN)
        return str(raised.value), len(server.requests), endpoint.stats()

    # 1000 x 2 + 50 x 10 per million is 0.0025 per request: the third reaches 0.0075
    settings = {"price_in": 2.0, "price_out": 10.0, "max_cost": 0.006}
    message, requests, stats = talk([chat()], work, **settings)
    assert (requests, stats["requests"]) == (3, 3)
    assert stats["cost"] == pytest.approx(0.0075)
    for part in ("judge.endpoint.max_cost=0.006", "0.0075 spent", "raise", "resume"):
        assert part in message


def test_the_budget_holds_for_retries_and_later_starts() -> None:
    with pytest.raises(BudgetSpent, match=r"1\.5 spent after 0 requests"):
        talk([chat()], one, spent=1.5, price_in=1.0, max_cost=1.5)

    async def work(endpoint: EndpointClient, server: Server) -> int:
        cheap = asyncio.create_task(endpoint.ask("a", "hi", PLAIN))
        with pytest.raises(BudgetSpent):  # its first attempt fails; when it tries again, the other one has spent all
            await asyncio.gather(endpoint.ask("b", "hi", PLAIN), cheap)
        return len(server.requests)

    assert (
        talk([error(500, "once", headers={"retry-after-ms": "1000"}), chat()], work, price_in=1.0, max_cost=0.001) == 2
    )


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}])
def test_without_token_counts_the_cost_is_an_upper_bound(usage: Any) -> None:
    _, stats, _ = talk([chat(usage=usage)], one, price_in=2.0, price_out=10.0, max_cost=1.0)
    assert (stats["prompt_tokens"], stats["completion_tokens"], stats["unmetered"]) == (0, 0, 1)
    assert stats["cost"] == pytest.approx((11 * 2 + 100 * 10) / 1e6)  # "Judge this." has 11 bytes
