"""Requests on real sockets: authentication, throttling, errors, and bounded reads of pods and Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tuneloop_operator.cluster.client import PAGE, Cluster
from tuneloop_operator.cluster.credentials import Credentials, CredentialsError, load_credentials
from tuneloop_operator.cluster.errors import Conflict, Forbidden, NotLeader, Refused, Throttled, Unauthorized, Unreachable
from tuneloop_operator.cluster.transport import Transport
from tuneloop_operator.domain.decision import Key, Target
from tuneloop_operator.settings import Settings

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers with what the test says, and remembers what was asked."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.answers: list[Answer] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        await request.read()
        return await (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(request)

    def say(self, *statuses: int, body: Any = None, **headers: str) -> None:
        async def answer(status: int) -> web.Response:
            return web.json_response(body if body is not None else {"message": "…"}, status=status, headers=headers)

        self.answers = [lambda _, status=status: answer(status) for status in statuses]  # type: ignore[misc]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def cluster(server: Server) -> AsyncIterator[Cluster]:
    cluster = Cluster(Transport(Credentials(server.url)), Settings(prometheus_url=server.url))
    yield cluster
    await cluster.close()


async def test_a_token_is_read_again_after_a_refusal(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    transport = Transport(Credentials(server.url, token_file=path))
    server.say(200)
    await transport.request("get", "GET", "/version")
    path.write_text("new")
    server.say(401, 200)
    await transport.request("get", "GET", "/version")
    assert [r.headers["Authorization"] for r in server.requests] == ["Bearer old", "Bearer old", "Bearer new"]
    server.say(401)
    with pytest.raises(Unauthorized):
        await transport.request("get", "GET", "/version")
    await transport.close()


async def test_a_throttled_request_waits_as_long_as_it_is_told_and_not_forever(server: Server) -> None:
    seen: list[tuple[str, int]] = []
    transport = Transport(Credentials(server.url), lambda verb, code, seconds: seen.append((verb, code)))
    server.say(429, 200, **{"Retry-After": "0.2"})
    started = time.monotonic()
    await transport.request("create", "POST", "/x", body={})
    assert time.monotonic() - started >= 0.2
    assert seen == [("create", 429), ("create", 200)]
    server.say(429, **{"Retry-After": "0.01"})
    with pytest.raises(Throttled):
        await transport.request("create", "POST", "/x", body={})
    await transport.close()


@pytest.mark.parametrize(("status", "error"), [(403, Forbidden), (409, Conflict), (422, Refused), (400, Refused)])
async def test_refusals_are_told_apart(server: Server, cluster: Cluster, status: int, error: type[Exception]) -> None:
    server.say(status, body={"reason": "Because", "message": "a sentence"})
    with pytest.raises(error, match="a sentence"):
        await cluster.merge(Key("ConfigMap", "n", "c"), {})


async def test_a_409_names_whose_precondition_failed(server: Server, cluster: Cluster) -> None:
    server.say(409, body={"reason": "Conflict"})
    with pytest.raises(Conflict) as caught:
        await cluster.delete(Target(Key("Job", "n", "j"), "uid"), "7")
    assert caught.value.key == Key("Job", "n", "j")


async def test_nothing_is_written_without_the_lease(server: Server, cluster: Cluster) -> None:
    def refuse() -> None:
        raise NotLeader("not held")

    cluster.guard = refuse
    server.say(200)
    manifest = {"kind": "ConfigMap", "metadata": {"name": "c", "namespace": "n"}}
    for write in (
        cluster.create(manifest),
        cluster.apply(manifest),
        cluster.apply_status(manifest),
        cluster.merge(Key("ConfigMap", "n", "c"), {}),
        cluster.patch(Key("ConfigMap", "n", "c"), []),
        cluster.delete(Target(Key("ConfigMap", "n", "c"), "uid"), None),
        cluster.record(manifest),
    ):
        with pytest.raises(NotLeader):
            await write
    assert server.requests == []


async def test_a_delete_names_what_it_deletes_and_gone_is_success(server: Server, cluster: Cluster) -> None:
    bodies = []

    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response({"reason": "NotFound"}, status=404)

    server.answers = [answer]
    await cluster.delete(Target(Key("Job", "n", "j"), "the-uid"), "7")
    assert bodies[0]["preconditions"] == {"uid": "the-uid", "resourceVersion": "7"}
    assert bodies[0]["propagationPolicy"] == "Background"


async def test_an_api_server_that_is_away_is_unreachable() -> None:
    transport = Transport(Credentials("http://127.0.0.1:1"))
    with pytest.raises(Unreachable):
        await transport.request("get", "GET", "/version")
    await transport.close()


async def test_lists_are_read_page_by_page(server: Server, cluster: Cluster) -> None:
    async def first(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [{"metadata": {"name": "a"}}]})

    async def second(request: web.Request) -> web.Response:
        assert request.query["continue"] == "more"
        return web.json_response({"metadata": {"resourceVersion": "9"}, "items": [{"metadata": {"name": "b"}}]})

    server.answers = [first, second]
    found = await cluster.list("Event", "n", labels={"a": "1"}, fields={"involvedObject.uid": "u"})
    assert [item["metadata"]["name"] for item in found] == ["a", "b"]
    assert dict(server.requests[0].query) == {"limit": str(PAGE), "labelSelector": "a=1", "fieldSelector": "involvedObject.uid=u"}


# --- pods and Prometheus ---


async def test_an_answer_of_a_pod_is_bounded_and_asked_without_credentials(server: Server, cluster: Cluster) -> None:
    cluster.transport.credentials.token = "secret"
    server.say(200, body="x" * 98)
    assert await cluster.http_get(f"{server.url}/progress", 100) == b'"' + b"x" * 98 + b'"'
    with pytest.raises(Unreachable, match="more than 99"):
        await cluster.http_get(f"{server.url}/progress", 99)
    assert "Authorization" not in server.requests[0].headers


async def test_a_pod_cannot_send_the_operator_elsewhere(server: Server, cluster: Cluster) -> None:
    server.say(302, Location=f"{server.url}/elsewhere")
    with pytest.raises(Unreachable, match="302"):
        await cluster.http_get(f"{server.url}/progress", 100)
    assert len(server.requests) == 1


async def test_a_pod_that_is_slow_or_away_is_unreachable(server: Server, cluster: Cluster) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1)
        return web.Response()

    server.answers = [slow]
    for url in (server.url, "http://[bad", "http://127.0.0.1:1/"):
        with pytest.raises(Unreachable):
            await cluster.http_get(url, 100, timeout=0.1)


async def test_a_query_gives_labels_and_values(server: Server, cluster: Cluster) -> None:
    result = [{"metric": {"pod": "a"}, "value": [1.0, "2.5"]}, {"metric": {"pod": "b"}, "value": [1.0, "NaN"]}]
    server.say(200, body={"status": "success", "data": {"resultType": "vector", "result": result}})
    found = await cluster.prometheus('up{job="x"}')
    assert found[0] == ({"pod": "a"}, 2.5)
    assert server.requests[0].query["query"] == 'up{job="x"}'


@pytest.mark.parametrize(
    "body", [{"data": {}}, [], {"data": {"result": [{"metric": {}}]}}, {"data": {"result": [{"metric": {}, "value": [1, "x"]}]}}]
)
async def test_what_is_no_vector_is_no_answer(server: Server, cluster: Cluster, body: Any) -> None:
    server.say(200, body=body)
    with pytest.raises(Unreachable):
        await cluster.prometheus("up")


async def test_a_token_that_cannot_be_read_makes_prometheus_unreachable(server: Server, tmp_path: Path) -> None:
    settings = Settings(prometheus_url=server.url, prometheus_token_file=str(tmp_path / "absent"))
    with pytest.raises(Unreachable, match="FileNotFoundError"):
        await Cluster(Transport(Credentials(server.url)), settings).prometheus("up")
    assert server.requests == []


async def test_without_a_prometheus_nothing_is_asked() -> None:
    with pytest.raises(Unreachable, match="no Prometheus"):
        await Cluster(Transport(Credentials("http://127.0.0.1:1")), Settings()).prometheus("up")


# --- credentials ---


def config(tmp_path: Path, user: str, server: str = "http://127.0.0.1:8001") -> dict[str, str]:
    path = tmp_path / "config"
    path.write_text(
        f"current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n"
        f"clusters: [{{name: k, cluster: {{server: '{server}'}}}}]\nusers: [{{name: u, user: {user}}}]\n"
    )
    return {"KUBECONFIG": str(path)}


async def test_a_kubeconfig_gives_server_and_token(tmp_path: Path) -> None:
    credentials = load_credentials(config(tmp_path, "{token: abc}"))
    assert (credentials.server, await credentials.headers()) == ("http://127.0.0.1:8001", {"Authorization": "Bearer abc"})


async def test_a_plugin_is_asked_for_a_token(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        '#!/bin/sh\necho x >> "$MARK"\nprintf \'{"status": {"token": "t", "expirationTimestamp": "2999-01-01T00:00:00Z"}}\'\n'
    )
    plugin.chmod(0o755)
    mark = tmp_path / "mark"
    user = f"{{exec: {{command: {plugin}, apiVersion: client.authentication.k8s.io/v1, env: [{{name: MARK, value: {mark}}}]}}}}"
    credentials = load_credentials(config(tmp_path, user))
    for _ in range(3):
        assert await credentials.headers() == {"Authorization": "Bearer t"}
    assert mark.read_text().count("x") == 1, "asked once, until it expires"
    await credentials.headers(is_refused=True)
    assert mark.read_text().count("x") == 2


async def test_a_plugin_that_fails_is_named(tmp_path: Path) -> None:
    credentials = load_credentials(config(tmp_path, "{exec: {command: /nowhere}}"))
    with pytest.raises(CredentialsError, match="/nowhere"):
        await credentials.headers()


def test_what_is_missing_in_a_kubeconfig_is_named(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="cannot read"):
        load_credentials({"KUBECONFIG": str(tmp_path / "none")})
    path = tmp_path / "config"
    path.write_text("current-context: c\n")
    with pytest.raises(CredentialsError, match="no contexts entry named 'c'"):
        load_credentials({"KUBECONFIG": str(path)})
