"""Before a revision takes traffic its engine must answer as the evaluator recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, status

from tuneloop_gateway import probes as probes_module
from tuneloop_gateway.contract import ProbeState
from tuneloop_trainer.contract import tokens_digest as of_trainer


def candidate(**more: Any) -> dict[str, Any]:
    return make_revision("new", state="Candidate", weight=0, probe=True, **more)


async def probed(gateway: Running, name: str = "new") -> ProbeState:
    await eventually(lambda: gateway.gateway.prober.state(name).status not in ("Pending", "Running"))
    return gateway.gateway.prober.state(name)


async def test_agreement_is_counted_over_the_recorded_items_through_the_revisions_prompt(start: Start, engine: FakeEngine) -> None:
    engine.probes = [{"prompt": f"p{i}", "answer": f"echo:  Q: p{i}\n", "maxTokens": 4} for i in range(10)]
    engine.probes[3]["answer"] = "something else"
    gateway = await start(make_config(candidate(prompt={"template": "Q: {{ text }}", "temperature": 1})), {"svc": (engine.address,)})
    state = await probed(gateway)
    assert (state.status, state.asked, state.agreed) == ("Done", 10, 9)
    assert "something else" in state.message
    assert {(r["temperature"], r["max_tokens"], r["model"]) for r in engine.requests} == {(0, 4, "id-new")}
    assert 'tuneloop_gateway_probe_agreement_ratio{deployment="tweets",namespace="team",revision="new"} 0.9' in await gateway.metrics()
    report = (await gateway.state()).revisions[0]
    assert report.warm
    assert report.warm_up_seconds > 0


async def test_a_prompt_that_does_not_render_is_told_and_its_revision_takes_nothing(start: Start, engine: FakeEngine) -> None:
    stable = make_revision("old")
    gateway = await start(make_config(stable, candidate(prompt={"template": "{{ text | nonsense }}"})), {"svc": (engine.address,)})
    await eventually(lambda: gateway.gateway.router.count("old").warm)
    reports = {report.name: report for report in (await gateway.state()).revisions}
    assert "nonsense" in reports["new"].prompt_error
    assert not reports["new"].warm
    assert reports["old"].prompt_error == ""


async def test_an_engine_without_recorded_items_says_so(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(candidate()), {"svc": (engine.address,)})
    assert (await probed(gateway)).status == "NoProbes"


@pytest.mark.parametrize(("version", "told"), [("0.32.0", "0.32.0"), (None, ""), ("<b>" * 99, "")])
async def test_vllms_version_is_told_where_the_engine_tells_it(start: Start, engine: FakeEngine, version: str | None, told: str) -> None:
    engine.version = version
    gateway = await start(endpoints={"svc": (engine.address,)})
    await eventually(lambda: gateway.gateway.router.count("r1").warm)
    assert (await gateway.state()).revisions[0].engine_version == told


@pytest.mark.parametrize(
    ("task", "prompt", "read"),
    [
        ("Chat", {}, "<user>Is it?<assistant>"),
        ("Chat", {"template": "Q: {{ text }}", "temperature": 1}, "<user>Q: Is it?<assistant>"),
        ("Chat", {"system": "Be short."}, "<system>Be short.<user>Is it?<assistant>"),
        ("Completion", {"template": "Q: {{ text }}"}, "Q: Is it?"),
    ],
)
async def test_the_tokens_that_the_engine_reads_of_a_text_are_told_by_their_digest(
    start: Start, engine: FakeEngine, task: str, prompt: dict[str, Any], read: str
) -> None:
    config = make_config(make_revision("r1", prompt=prompt, probeText="Is it?"), make_revision("r2", weight=0), task=task)
    gateway = await start(config, {"svc": (engine.address,)})
    await eventually(lambda: gateway.gateway.router.count("r1").warm)
    reports = {report.name: report for report in (await gateway.state()).revisions}
    assert reports["r1"].prompt_digest == of_trainer(list(read.encode()))
    assert reports["r2"].prompt_digest == ""


async def test_an_engine_that_does_not_tell_its_tokens_is_warm_all_the_same(start: Start, engine: FakeEngine) -> None:
    engine.chat_template = None
    gateway = await start(make_config(make_revision(probeText="Is it?")), {"svc": (engine.address,)})
    await eventually(lambda: gateway.gateway.router.count("r1").warm)
    assert (await gateway.state()).revisions[0].prompt_digest == ""


async def test_at_most_eight_probes_run_at_once(start: Start, engine: FakeEngine) -> None:
    running = most = 0

    async def slow(_: web.Request, __: object) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return web.json_response({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]})

    engine.reply = slow
    engine.probes = [{"prompt": f"p{i}", "answer": "a", "max_tokens": 4} for i in range(30)]
    gateway = await start(make_config(candidate()), {"svc": (engine.address,)})
    assert (await probed(gateway)).agreed == 30
    assert most == 8


async def test_what_fails_by_transport_is_failed_and_asked_again(start: Start, engine: FakeEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(probes_module, "AGAIN_SECONDS", 0.3)
    monkeypatch.setattr(probes_module, "TRIES", 1)
    engine.probes = [{"prompt": "p", "answer": "echo: p", "maxTokens": 4}]
    engine.replies = [status(500)]
    gateway = await start(make_config(candidate()), {"svc": (engine.address,)})
    await eventually(lambda: gateway.gateway.prober.state("new").status == "Failed")
    assert "500" in gateway.gateway.prober.state("new").message
    await eventually(lambda: gateway.gateway.prober.state("new").status == "Done")
    assert gateway.gateway.prober.state("new").agreed == 1


async def test_another_prompt_is_probed_anew(start: Start, engine: FakeEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(probes_module, "LOOK_SECONDS", 0.05)
    engine.probes = [{"prompt": "p", "answer": "echo: p", "maxTokens": 4}]
    gateway = await start(make_config(candidate()), {"svc": (engine.address,)})
    assert (await probed(gateway)).agreed == 1
    gateway.configure(make_config(candidate(prompt={"template": "changed {{ text }}"}), generation=2))
    await eventually(lambda: gateway.gateway.prober.state("new").agreed == 0)
    await eventually(lambda: gateway.gateway.prober.state("new").status == "Done")


async def test_a_promoted_revision_keeps_its_result(start: Start, engine: FakeEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(probes_module, "LOOK_SECONDS", 0.02)
    engine.probes = [{"prompt": "p", "answer": "echo: p", "maxTokens": 4}]
    gateway = await start(make_config(candidate()), {"svc": (engine.address,)})
    await probed(gateway)
    gateway.configure(make_config(make_revision("new", probe=False), generation=2))
    await asyncio.sleep(0.1)
    report = (await gateway.state()).revisions[0]
    assert (report.warm, report.probe.agreed) == (True, 1)
    assert len(engine.requests) == 1


async def test_probes_wait_until_the_engine_is_ready(start: Start) -> None:
    gateway = await start(make_config(candidate()), endpoints={})
    await asyncio.sleep(0.1)
    report = (await gateway.state()).revisions[0]
    assert (report.probe.status, report.warm) == ("Pending", False)
