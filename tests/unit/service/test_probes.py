"""A probe's life over HTTP, with an agent at the other end of the link."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.service.peers import World, good, target
from trapline.errors import EngineError, NotFound, Unsupported
from trapline.model import HostResolution, ResolvedSite, TargetState
from trapline.protocol.messages import Observed
from trapline.protocol.stream import Status
from trapline_service.config import Settings
from trapline_service.server import Server


async def phase_is(world: World, probe: str, phase: str) -> dict[str, Any]:
    """Waits on the stream until a probe has a phase; returns it."""
    async with world.subscriber() as subscriber:
        await subscriber.subscribe("s", "probes", filter={"probes": [probe]})
        found = await subscriber.until(
            lambda m: isinstance(m, Status) and m.probe is not None and m.probe.status.phase == phase
        )
    result: dict[str, Any] = found.probe.model_dump(mode="json")
    return result


async def gone(world: World, probe: str) -> None:
    async with world.subscriber() as subscriber:
        await subscriber.subscribe("s", "probes")
        if (await world.http.get(f"/probes/{probe}")).status_code == 200:
            await subscriber.until(lambda m: isinstance(m, Status) and m.removed == probe)
    assert (await world.http.get(f"/probes/{probe}")).status_code == 404


async def test_from_post_to_armed_to_gone(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create("app:f {arg0}", labels={"team": "x"})
        assert probe["name"] == "f"
        assert probe["status"]["phase"] == "Resolving"
        await agent.until(lambda: probe["id"] in agent.desired)
        assert agent.desired[probe["id"]].spec.captures[0].text == "arg0"

        await agent.observe(probe["id"])
        armed = await phase_is(world, "f", "Armed")
        assert armed["status"]["coverage"] == {"eligible": 1, "armed": 1}
        assert armed["labels"] == {"team": "x"}
        (only,) = (await world.get("/probes/f/targets"))["items"]
        assert (only["host"], only["pid"], only["state"]) == ("hst_a", 7, "armed")

        agent.confirm_removals = False
        response = await world.http.delete("/probes/f")
        assert response.status_code == 202
        assert response.json()["status"]["phase"] == "Deleting"
        await agent.until(lambda: agent.removals == [probe["id"]])
        assert (await world.get("/probes/f"))["status"]["phase"] == "Deleting"
        assert (await world.http.delete("/probes/f")).status_code == 202
        await agent.observe(probe["id"], targets=[], removed=True)
        await gone(world, probe["id"])
        assert (await world.get("/probes"))["items"] == []


async def test_the_dry_run_arms_nothing(world: World) -> None:
    async with world.agent() as agent:
        response = await world.http.post("/probes:resolve", json={"probe": "app:f"})
        assert response.status_code == 200
        assert response.json()["hosts"][0]["sites"][0]["symbol"] == "f"
        assert response.json()["hosts"][0]["targets"][0]["host"] == "hst_a"
        assert response.json()["spec"]["point"]["value"] == "f"
        assert not agent.desired
        assert (await world.get("/probes"))["items"] == []


def hopeless(error: Exception) -> Any:
    return lambda _: {"error": error.to_wire()}  # type: ignore[attr-defined]


async def test_an_unknown_symbol_is_refused_with_suggestions(world: World) -> None:
    async with world.agent() as agent:
        agent.answer = hopeless(NotFound("no symbol `g` in app", reason="NoSymbol", suggestions=["f", "gg"]))
        response = await world.http.post("/probes", json={"probe": "app:g"})
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["code"], problem["reason"], problem["suggestions"]) == ("not-found", "NoSymbol", ["f", "gg"])
        assert problem["status"] == 422
        assert (await world.get("/probes"))["items"] == []
        assert not agent.desired


async def test_a_refused_site_and_refused_targets_refuse_the_probe(world: World) -> None:
    async with world.agent() as agent:
        why = Unsupported("0x10 is in mid-instruction", reason="MidInstruction").to_wire()
        site = ResolvedSite(module="/bin/app", offset=16, refused=why)
        agent.answer = lambda _: HostResolution(host="hst_a", sites=[site]).model_dump(mode="json")
        problem = (await world.http.post("/probes", json={"probe": "app:0x10"})).json()
        assert (problem["status"], problem["code"], problem["reason"]) == (422, "unsupported", "MidInstruction")

        traced = target(state=TargetState.REFUSED, reason="TracedByOther", message="pid 7 is traced by gdb (9)")
        answer = good("hst_a").model_copy(update={"targets": [traced]})
        agent.answer = lambda _: answer.model_dump(mode="json")
        problem = (await world.http.post("/probes", json={"probe": "app:f"})).json()
        assert (problem["status"], problem["reason"]) == (422, "TracedByOther")
        assert "gdb" in problem["detail"]


async def test_one_host_that_can_is_enough(world: World) -> None:
    async with world.agent() as able, world.agent("hst_b", name="web-2", link_id="lnk_b") as unable:
        unable.answer = hopeless(EngineError("no ptrace here"))
        probe = await world.create()
        await able.until(lambda: probe["id"] in able.desired)
        await able.observe(probe["id"])
        await unable.observe(probe["id"], targets=[], error=EngineError("no ptrace here").to_wire())
        partial = await phase_is(world, probe["id"], "Partial")
        (condition,) = partial["status"]["conditions"]
        assert (condition["host"], condition["type"], condition["message"]) == ("hst_b", "Resolved", "no ptrace here")


async def test_a_host_pattern_keeps_other_hosts_out(world: World) -> None:
    async with world.agent() as a, world.agent("hst_b", name="db-1", link_id="lnk_b") as b:
        probe = await world.create("app:f @ host=web-*")
        await a.until(lambda: probe["id"] in a.desired)
        after = await world.create("app:h")
        await b.until(lambda: after["id"] in b.desired)
        assert set(b.desired) == {after["id"]}


async def test_no_host_online(world: World) -> None:
    response = await world.http.post("/probes", json={"probe": "app:f"})
    assert response.status_code == 503
    assert response.json()["code"] == "unavailable"
    assert "allow_offline" in response.json()["hint"]
    assert response.headers["retry-after"]
    probe = await world.create(allow_offline=True)
    assert probe["status"]["phase"] == "Pending"
    async with world.agent() as agent:
        assert agent.full_sets == [[probe["id"]]]
        await agent.observe(probe["id"], targets=[])
        await phase_is(world, "f", "NoTargets")
    pending = await phase_is(world, "f", "Pending")
    assert [c["reason"] for c in pending["status"]["conditions"]] == ["HostOffline"]
    assert (await world.http.delete("/probes/f")).json()["status"]["phase"] == "Deleting"
    await gone(world, probe["id"])


async def test_names(world: World) -> None:
    async with world.agent():
        assert (await world.create())["name"] == "f"
        assert (await world.create())["name"] == "f-2"
        assert (await world.create(name="mine"))["name"] == "mine"
        assert (await world.create("own=app:f"))["name"] == "own"
        response = await world.http.post("/probes", json={"probe": "app:f", "name": "mine"})
        assert response.status_code == 409
        assert response.json()["errors"][0]["pointer"] == "/name"


@pytest.mark.parametrize("name", ["a/b", " a", "a\n", "prb_0", "\x00"])
async def test_a_name_that_would_not_fit_a_url(world: World, name: str) -> None:
    async with world.agent():
        response = await world.http.post("/probes", json={"probe": "app:f", "name": name})
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "/name"


async def test_two_requests_cannot_take_one_name(world: World) -> None:
    async with world.agent():
        both = await asyncio.gather(
            *(world.http.post("/probes", json={"probe": "app:f", "name": "mine"}) for _ in range(2))
        )
        assert sorted(r.status_code for r in both) == [201, 409]


async def test_a_wrong_text_shows_the_place(world: World) -> None:
    response = await world.http.post("/probes", json={"probe": "redis-server processCommand"})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "spec-invalid")
    text, caret = problem["caret"].splitlines()
    assert text == "redis-server processCommand"
    assert caret.endswith("^")
    assert problem["errors"][0]["pointer"] == "/probe"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/probe"),
        ({"probe": "app:f", "ttl": 3}, "/ttl"),
        ({"probe": "app:f", "ttl_s": 0}, "/ttl_s"),
        ({"probe": "app:f", "limits": {"max_hits": 0}}, "/limits/max_hits"),
        ({"probe": 7}, "/probe"),
    ],
)
async def test_a_wrong_body_names_the_field(world: World, body: Any, pointer: str) -> None:
    response = await world.http.post("/probes", json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "request-invalid"
    assert response.json()["errors"][0]["pointer"] == pointer


async def test_it_expires(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create(ttl_s=1)
        await agent.until(lambda: probe["id"] in agent.removals)
        expired = await phase_is(world, probe["id"], "Expired")
        assert expired["status"]["coverage"]["armed"] == 0
        # Its name is free again, and the live probe is the one that the name means.
        again = await world.create(name=probe["name"])
        assert (await world.get(f"/probes/{probe['name']}"))["id"] == again["id"]


async def test_it_is_completed_at_its_limit(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create(limits={"max_hits": 5})
        await agent.until(lambda: probe["id"] in agent.desired)
        assert agent.desired[probe["id"]].limits.max_hits == 5
        await agent.observe(probe["id"], counters=5, completed=True)
        done = await phase_is(world, probe["id"], "Completed")
        assert done["status"]["counters"]["hits"] == 5
        await agent.until(lambda: probe["id"] in agent.removals)


async def test_the_record_of_a_restart(settings: Settings) -> None:
    async with Server(settings) as first:
        token = first.new_token
        assert token
        async with World(first.url, token) as world, world.agent() as agent:
            kept = await world.create("app:f")
            deleted = await world.create("app:h")
            await agent.observe(kept["id"], counters=42)
            await phase_is(world, kept["id"], "Armed")
            agent.confirm_removals = False
            await world.http.delete(f"/probes/{deleted['id']}")
    async with Server(settings) as second:
        assert second.new_token is None
        async with World(second.url, token) as world:
            (host,) = (await world.get("/hosts"))["items"]
            assert (host["id"], host["online"]) == ("hst_a", False)
            (probe,) = (await world.get("/probes"))["items"]
            assert probe["id"] == kept["id"]
            assert probe["status"]["counters"]["hits"] == 42
            async with world.agent() as agent:
                assert agent.full_sets == [[kept["id"]]]


async def test_an_agent_is_told_to_drop_what_nobody_knows(world: World) -> None:
    async with world.agent() as agent:
        await agent.say(Observed(probe="prb_stale", generation=1, resolved=True))
        await agent.until(lambda: agent.removals == ["prb_stale"])


async def test_a_host_that_leaves_does_not_hold_up_a_deletion(world: World) -> None:
    async with world.agent() as agent:
        probe = await world.create()
        agent.confirm_removals = False
        await world.http.delete("/probes/f")
    await gone(world, probe["id"])


async def test_an_agent_started_anew_is_asked_again_to_confirm(world: World) -> None:
    async with world.agent() as first:
        probe = await world.create()
        first.confirm_removals = False
        await world.http.delete("/probes/f")
        async with world.agent(link_id="lnk_2") as second:
            await second.until(lambda: second.removals == [probe["id"]])
            await gone(world, probe["id"])
