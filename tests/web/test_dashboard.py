"""The dashboard in a real browser, against the real service."""

from __future__ import annotations

import asyncio
import gzip
import re
import struct

import pytest
from playwright.async_api import Locator, Page, expect

from tests.support import needs
from tests.unit.service.peers import World
from tests.web.host import HELD_BY_GDB, Host, linked, target
from trapline.aggregates import Table
from trapline.model import Counters, TargetState
from trapline.protocol import aggregates as wire
from trapline.protocol.stacks import StackFile
from trapline_service.config import Settings
from trapline_service.dashboard import STATIC
from trapline_service.server import Server

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs.chromium, needs.node]


def probe_text(page: Page) -> Locator:
    return page.get_by_test_id("probe-text")


def button(page: Page | Locator, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


async def arm(page: Page, host: Host, text: str = "libc.so.6:malloc {n=arg0}", symbol: str = "malloc") -> str:
    """Arms a probe by hand; returns its id once the list shows it as armed."""
    await probe_text(page).fill(text)
    await page.keyboard.press("Escape")
    await button(page, "Arm probe").click()
    probe = await host.armed(symbol)
    await expect(page.locator(f'[data-probe="{probe}"][data-testid="probe"]')).to_have_attribute(
        "data-phase", "Partial"
    )
    return probe


# --- signing in ------------------------------------------------------------------------------------------------------


async def test_sign_in_by_hand_reload_and_sign_out(page: Page, world: World) -> None:
    await page.goto(world.url)
    await expect(page.get_by_text("Where is the token?")).to_be_visible()
    await page.get_by_label("Access token").fill(world.token)
    await button(page, "Sign in").click()
    await expect(page.get_by_test_id("link-state")).to_have_text("Live")
    assert world.token not in page.url

    await page.reload()
    await expect(page.get_by_test_id("link-state")).to_have_text("Live")

    await button(page, "Sign out").click()
    await expect(page.get_by_label("Access token")).to_be_visible()
    await page.reload()
    await expect(page.get_by_label("Access token")).to_be_visible()


async def test_a_wrong_token_is_refused_with_a_reason_and_can_be_corrected(page: Page, world: World) -> None:
    await page.goto(f"{world.url}/#token=tlp_{'x' * 43}")
    await expect(page.get_by_test_id("problem")).to_contain_text("token")
    assert "tlp_" not in page.url
    await page.get_by_label("Access token").fill(world.token)
    await button(page, "Sign in").click()
    await expect(page.get_by_test_id("link-state")).to_have_text("Live")


async def test_the_token_leaves_the_address_at_once(home: Page, world: World) -> None:
    assert await home.evaluate("location.href") == f"{world.url}/"
    assert await home.evaluate("Object.values(sessionStorage)") == [world.token]
    assert await home.evaluate("Object.values(localStorage)") == []


# --- hosts and processes ---------------------------------------------------------------------------------------------


async def test_without_a_host_it_says_how_to_get_one(page: Page, world: World) -> None:
    await page.goto(f"{world.url}/#token={world.token}")
    await expect(page.get_by_text(f"trapline agent --server {world.url}")).to_be_visible()
    await expect(page.get_by_test_id("no-probes")).to_contain_text("No probes yet")
    async with linked(world):
        await expect(page.get_by_test_id("host")).to_contain_text("web-1")
        await expect(page.get_by_test_id("process")).to_have_count(5)
    await expect(page.get_by_test_id("host")).to_contain_text("offline")
    await expect(page.get_by_text("web-1 is offline")).to_be_visible()


async def test_processes_are_searched_and_picked(home: Page) -> None:
    processes = home.get_by_test_id("process")
    await expect(processes).to_have_count(5)
    own = home.locator('[data-testid="process"][data-pid="90"]')
    await expect(own).to_contain_text("part of Trapline")
    await expect(own.get_by_role("button")).to_be_disabled()

    await home.get_by_label("Search processes").fill("worker")
    await expect(processes).to_have_count(1)
    await probe_text(home).fill("libc.so.6:malloc")
    await processes.get_by_role("button").first.click()
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc @ pid=71")
    await button(home, "Probe every process named nginx").click()
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc @ comm=nginx")
    await button(home, "Remove the selector comm").click()
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc")

    await home.get_by_label("Search processes").fill("no such thing")
    await expect(home.get_by_text("Nothing matches")).to_be_visible()


async def test_processes_are_chosen_in_the_composer_by_keyboard(home: Page) -> None:
    await probe_text(home).fill("libc.so.6:malloc")
    await button(home, "All processes").click()
    await home.get_by_label("Choose processes").fill("ngi")
    await expect(home.get_by_test_id("scope-option").first).to_contain_text("2 processes")
    await home.keyboard.press("Enter")
    await expect(home.get_by_test_id("selector")).to_have_text(re.compile(r"comm\s+nginx"))
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc @ comm=nginx")


# --- composing a probe -----------------------------------------------------------------------------------------------


async def test_symbol_search_fills_the_text_and_shows_what_it_would_do(home: Page) -> None:
    await home.keyboard.press("/")
    await expect(probe_text(home)).to_be_focused()
    await home.keyboard.type("mal")
    options = home.get_by_test_id("symbol")
    await expect(options).to_have_count(2)
    await expect(options.first).to_contain_text("libc.so.6")
    await expect(options.first).to_contain_text("617 B")
    await home.keyboard.press("ArrowDown")
    await expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    await home.keyboard.press("ArrowUp")
    await home.keyboard.press("Enter")
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc")

    resolution = home.get_by_test_id("resolution")
    await expect(resolution).to_contain_text("Would arm 1 process on 1 host")
    await expect(resolution).to_contain_text("push rbp")
    await expect(resolution).to_contain_text("emulated")
    await expect(home.get_by_test_id("refusal")).to_contain_text(HELD_BY_GDB)
    await expect(home.get_by_test_id("probe")).to_have_count(0)

    await button(home, "arg0").click()
    await button(home, "str(arg1)").click()
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc {arg0, str(arg1)}")
    await expect(resolution).to_be_hidden()
    await button(home, "arg0").click()
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc {str(arg1)}")


async def test_a_search_without_a_match_says_where_it_looked(home: Page) -> None:
    await probe_text(home).press_sequentially("zzz")
    await expect(home.get_by_role("listbox", name="Symbols")).to_contain_text("No function has “zzz” in its name")


async def test_an_unknown_symbol_offers_others_and_one_click_takes_one(home: Page, host: Host) -> None:
    await probe_text(home).fill("libc.so.6:maloc {arg0}")
    await button(home, "Arm probe").click()
    problem = home.get_by_test_id("problem")
    await expect(problem).to_contain_text("no symbol `maloc`")
    await expect(home.get_by_test_id("problem-reason")).to_have_text("NoSuchSymbol")
    assert host.agent.desired == {}
    await button(problem, "malloc").click()
    await expect(probe_text(home)).to_have_value("libc.so.6:malloc {arg0}")
    await expect(home.get_by_test_id("resolution")).to_contain_text("Would arm 1 process")


async def test_a_malformed_text_shows_the_place(home: Page) -> None:
    await probe_text(home).fill("libc.so.6:malloc {arg0")
    await button(home, "Dry run").click()
    caret = home.get_by_test_id("caret")
    await expect(caret).to_contain_text("libc.so.6:malloc {arg0\n")
    await expect(caret).to_contain_text("^")
    await probe_text(home).fill("libc.so.6:malloc {arg0}")
    await expect(caret).to_be_hidden()


async def test_with_no_host_online_a_probe_can_be_kept_for_later(page: Page, world: World) -> None:
    await page.goto(f"{world.url}/#token={world.token}")
    await probe_text(page).fill("libc.so.6:malloc")
    await button(page, "Arm probe").click()
    await page.get_by_role("button", name="Keep it").click()
    await expect(page.get_by_test_id("probe")).to_have_attribute("data-phase", "Pending")
    async with linked(world) as host:
        await host.armed()
        await expect(page.get_by_test_id("probe")).to_have_attribute("data-phase", "Partial")


# --- probes ----------------------------------------------------------------------------------------------------------


async def test_a_probe_is_armed_hits_show_and_it_is_removed(home: Page, host: Host) -> None:
    probe = await arm(home, host)
    assert host.agent.desired[probe].spec.text == "libc.so.6:malloc {n=arg0}"
    await expect(probe_text(home)).to_have_value("")
    row = home.get_by_test_id("probe")
    await expect(row.get_by_test_id("coverage")).to_have_text("1 / 2")
    await expect(row.get_by_test_id("probe-name")).to_have_text("malloc")

    await button(home, "Show where malloc is armed").click()
    targets = row.get_by_test_id("target")
    await expect(targets).to_have_count(2)
    await expect(targets.filter(has_text="refused")).to_contain_text(HELD_BY_GDB)
    await expect(targets.filter(has_text="ptrace")).to_contain_text("0x7f0000009a000")

    await host.hit(probe, 3, text='GET "x"')
    hits = home.get_by_test_id("hit")
    await expect(hits).to_have_count(3)
    await expect(hits.nth(2)).to_contain_text("app:f")
    await expect(hits.nth(2)).to_contain_text("n=2")
    await expect(hits.nth(2)).to_contain_text('s="GET \\"x\\""')
    await expect(hits.nth(2)).to_contain_text("7/8")
    await host.observe(probe)
    await expect(row.get_by_test_id("hits")).to_have_text("3")
    await expect(row.get_by_test_id("rate")).not_to_have_text("0")
    await expect(row).to_contain_text("11.2 µs")

    host.agent.confirm_removals = False
    await button(home, "Remove malloc").click()
    await button(row, "Keep").click()
    await button(home, "Remove malloc").click()
    await button(row, "Remove").click()
    await expect(row).to_have_attribute("data-phase", "Deleting")
    await host.agent.until(lambda: host.agent.removals == [probe])
    await host.agent.observe(probe, targets=[], removed=True)
    await expect(row).to_have_count(0)
    await expect(home.get_by_test_id("no-probes")).to_be_visible()


async def test_a_probe_that_another_client_makes_and_removes_comes_and_goes(
    home: Page, world: World, host: Host
) -> None:
    made = await world.create("libc.so.6:getpid", name="theirs", ttl_s=90)
    row = home.get_by_test_id("probe")
    await expect(row.get_by_test_id("probe-name")).to_have_text("theirs")
    await expect(row).to_contain_text(re.compile(r"1:[0-2]\d"))
    await world.http.delete(f"/probes/{made['id']}")
    await expect(row).to_have_count(0)


async def test_a_probe_over_its_budget_says_what_is_not_counted(home: Page, host: Host) -> None:
    probe = await arm(home, host)
    why = "the probe adds 52% of a CPU to the time of programs, and may add 10%"
    over = target(70, "nginx", "malloc").model_copy(
        update={"state": TargetState.THROTTLED, "reason": "OverBudget", "message": why, "covered": 0.19}
    )
    await host.agent.observe(probe, targets=[over], counters=Counters(hits=900, uncovered_ms=12_340))
    row = home.get_by_test_id("probe")
    await expect(row).to_have_attribute("data-phase", "Partial")
    await expect(row.get_by_test_id("probe-note")).to_contain_text(why)
    await expect(row.get_by_test_id("drops")).to_have_text("0+")
    await expect(row.get_by_test_id("drops")).to_have_attribute("title", re.compile("12.3 s"))
    await button(home, "Show where malloc is armed").click()
    shown = row.get_by_test_id("target")
    await expect(shown).to_contain_text("throttled")
    await expect(shown).to_contain_text(re.compile(r"seen for 19\s%"))
    # Armed again; what was missed stays told.
    await host.agent.observe(
        probe, targets=[target(70, "nginx", "malloc")], counters=Counters(hits=950, uncovered_ms=12_340)
    )
    await expect(row).to_have_attribute("data-phase", "Armed")
    await expect(row.get_by_test_id("drops")).to_have_text("0+")


# --- the live tail ---------------------------------------------------------------------------------------------------


async def test_a_pause_holds_the_rows_and_goes_on_counting(home: Page, host: Host) -> None:
    probe = await arm(home, host)
    await host.hit(probe, 2)
    hits = home.get_by_test_id("hit")
    await expect(hits).to_have_count(2)
    await home.get_by_test_id("tail").click()
    await home.keyboard.press("p")
    await host.hit(probe, 40)
    await expect(home.get_by_test_id("pending")).to_have_text("40 new hits since the pause")
    await expect(home.get_by_test_id("tail-total")).to_have_text("42")
    await expect(hits).to_have_count(2)
    await button(home, "Resume").click()
    await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", "42")
    await expect(home.locator('[data-testid="hit"][data-seq="41"]')).to_be_in_viewport()


async def test_lost_hits_show_inline_where_they_are_missing(home: Page, host: Host) -> None:
    probe = await arm(home, host)
    await host.hit(probe, 1)
    await host.lose(probe, 40)
    await host.hit(probe, 1)
    gap = home.get_by_test_id("gap")
    await expect(gap).to_have_count(1)
    await expect(gap).to_contain_text("40 hits lost")
    await expect(gap).to_contain_text("of malloc on web-1")
    await expect(gap).to_have_attribute("data-stage", "agent-outbox")
    rows = home.locator('[data-testid="hit"], [data-testid="gap"]')
    await expect(rows).to_have_count(3)
    await expect(rows.nth(1)).to_have_attribute("data-testid", "gap")


async def test_the_tail_narrows_to_one_probe(home: Page, host: Host) -> None:
    one = await arm(home, host)
    two = await arm(home, host, "libc.so.6:getpid", "getpid")
    await host.hit(one, 2)
    await host.hit(two, 3)
    await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", "5")
    await button(home, "Show only the hits of getpid").click()
    await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", "3")
    await host.hit(two, 1)
    await host.hit(one, 1)
    await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", "4")
    await home.get_by_test_id("tail-filter").select_option(label="All probes")
    await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", "7")


async def test_of_many_hits_only_those_on_screen_are_elements(home: Page, host: Host) -> None:
    probe = await arm(home, host)
    for sent in range(10_000, 50_001, 10_000):
        for _ in range(5):
            await host.hit(probe, 2000)
        # All at once would be more than waits for one subscriber: the service would show a gap, rightly.
        await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", str(sent))
    last = home.locator('[data-testid="hit"][data-seq="49999"]')
    await expect(last).to_be_in_viewport()
    assert await home.get_by_test_id("hit").count() < 60

    log = home.get_by_role("log", name="Hits")
    await log.focus()
    await home.keyboard.press("Home")
    first = home.locator('[data-testid="hit"][data-seq="0"]')
    await expect(first).to_be_in_viewport()
    await host.hit(probe, 2000)
    await expect(home.get_by_test_id("tail")).to_have_attribute("data-rows", "52000")
    await expect(first).to_be_in_viewport()
    await button(home, "Newest").click()
    await expect(home.locator('[data-testid="hit"][data-seq="51999"]')).to_be_in_viewport()


# --- the connection --------------------------------------------------------------------------------------------------


async def test_it_comes_back_after_a_restart_of_the_service_and_tells_what_was_missed(
    home: Page, world: World, host: Host, server: Server, settings: Settings
) -> None:
    probe = await arm(home, host)
    await host.hit(probe, 5)
    await expect(home.get_by_test_id("hit")).to_have_count(5)

    await server.stop()
    await expect(home.get_by_test_id("link-state")).to_have_text("Disconnected")
    await expect(home.get_by_test_id("banner")).to_contain_text("The connection to the service is lost")
    await expect(home.get_by_test_id("hit")).to_have_count(5)

    again = settings.model_copy(update={"port": server.port})
    async with Server(again), linked(world) as returned:
        # It may have come back by itself in the meantime.
        await button(home, "Try now").or_(home.get_by_test_id("link-state").get_by_text("Live")).first.click()
        await expect(home.get_by_test_id("link-state")).to_have_text("Live")
        await expect(home.get_by_test_id("banner")).to_be_hidden()
        returned.sent[probe] = 12  # the host went on meanwhile, and its agent had to let seven go
        await returned.armed()
        await returned.hit(probe, 1)
        await expect(home.get_by_test_id("gap")).to_have_attribute("data-count", "7")
        await expect(home.get_by_test_id("hit")).to_have_count(6)


# --- form ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["dark", "light"])
async def test_the_theme_is_the_system_s_and_can_be_changed_for_good(page: Page, world: World, theme: str) -> None:
    other = {"dark": "light", "light": "dark"}
    await page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    await page.goto(f"{world.url}/#token={world.token}")
    html = page.locator("html")
    await expect(html).to_have_attribute("data-theme", theme)
    await button(page, f"Use the {other[theme]} theme").click()
    await expect(html).to_have_attribute("data-theme", other[theme])
    await page.reload()
    await expect(html).to_have_attribute("data-theme", other[theme])


# --- aggregates ------------------------------------------------------------------------------------------------------


async def test_a_table_that_grows(home: Page, host: Host) -> None:
    probe = await arm(home, host, "libc.so.6:malloc -> sum(arg0) by (comm)")
    panel = home.get_by_test_id("aggregate")
    await expect(panel).to_contain_text("No hits yet")
    await host.add_up(probe, "sum", {"nginx": [64] * 3, "redis\n": [1 << 60]})
    await expect(panel.get_by_test_id("aggregate-count")).to_have_text("4 hits · 2 rows")
    rows = panel.get_by_test_id("aggregate-row")
    await expect(rows).to_have_text(
        [re.compile(r"nginx\s*3\s*192"), re.compile(r"redis\\n\s*1\s*1,152,921,504,606,846,976")]
    )
    await host.add_up(probe, "sum", {"redis\n": [1] * 9})
    await expect(rows.first).to_have_text(re.compile(r"redis\\n\s*10\s*1,152,921,504,606,846,985"))
    await expect(home.get_by_test_id("rate")).not_to_have_text("0")
    await host.lose(probe, 5)
    await host.add_up(probe, "sum", {"nginx": [1]})
    await expect(panel.get_by_role("status")).to_contain_text("5 hits were lost")
    await button(panel, "All hits").click()
    await expect(home.get_by_test_id("tail")).to_be_visible()
    await button(home, "Show the aggregate of malloc").click()
    await expect(rows).to_have_count(2)
    await home.reload()
    await button(home, "Show the aggregate of malloc").click()
    await expect(rows).to_have_count(2)


async def test_rows_that_read_the_same_are_rows_apart(home: Page, host: Host) -> None:
    """Stacks in two builds of a program, and values that could not be had for two reasons."""
    probe = await arm(home, host, "libc.so.6:malloc -> count() by (ustack(), str(arg0))")
    files = {n: StackFile("/srv/app", build_id=f"{n:040x}") for n in (1, 2)}
    table = Table(10)
    for file, status, count in ((1, 0, 4), (2, 0, 3), (1, 2, 2), (1, 3, 1)):
        stack = struct.pack("<3Q", 0, file << 32 | 16, file << 32 | 32)
        table.cell(((stack, 0), (None if status else b"x", status))).count += count
    ((_, sent),) = wire.split(
        table.cells.items(), None, host=host.agent.host, probe=probe, source="s", seq=0, begin_ns=1, end_ns=2,
        of_stacks=[0], file=files.__getitem__,
    )  # fmt: skip
    await host.agent.send_batch(sent)
    place = r"app\+0x10 <- app\+0x20"
    await expect(home.get_by_test_id("aggregate").get_by_test_id("aggregate-row")).to_have_text(
        [re.compile(rf"{place}\s*{value}\s*{n}") for value, n in (("x", 4), ("x", 3), ("<null>", 2), ("<fault>", 1))]
    )


async def test_histograms_are_bars(home: Page, host: Host) -> None:
    probe = await arm(home, host, "libc.so.6:malloc -> hist(arg0) by (comm)")
    await host.add_up(probe, "hist", {"nginx": [3] * 40 + [100] * 10 + [5000] * 20, "curl": [7]})
    panel = home.get_by_test_id("aggregate")
    first = panel.locator("figure").first
    await expect(first).to_contain_text("comm = nginx")
    await expect(first.locator(".label")).to_have_text(
        ["2 – 4", "4 – 8", "8 – 16", "16 – 32", "32 – 64", "64 – 128", "128 – 256", "256 – 512", "512 – 1K",
         "1K – 2K", "2K – 4K", "4K – 8K"]
    )  # fmt: skip
    widths = await first.locator(".bar > span").evaluate_all("all => all.map(e => e.style.width)")
    assert [widths[0], widths[5], widths[11], widths[1]] == ["100%", "25%", "50%", "0%"]
    await expect(panel.locator("figure")).to_have_count(2)


async def test_quantiles_are_numbers_and_what_is_frequent_a_list(home: Page, host: Host) -> None:
    probe = await arm(home, host, "ur:libc.so.6:malloc -> quantiles(latency)")
    await host.add_up(probe, "quantiles", {"": list(range(1000, 11000))}, keyed=False)
    panel = home.get_by_test_id("aggregate")
    await expect(panel.locator("th")).to_have_text(
        ["hits", "min", "median", "90 %", "95 %", "99 %", "99.9 %", "max", ""]
    )
    await expect(panel.get_by_test_id("aggregate-row")).to_contain_text(re.compile(r"10,000\s*1.0 µs\s*(5.9|6.0) µs"))
    other = await arm(home, host, "libc.so.6:calloc -> topk(arg0, 2)", "calloc")
    await host.add_up(other, "topk", {"": [5] * 30 + [6] * 20 + [7]}, keyed=False, parameters=(2,))
    await expect(panel.locator(".items .label")).to_have_text(["5", "6"])
    await expect(panel.locator(".items .n")).to_have_text(["30", "20"])


@pytest.mark.parametrize("width", [390, 768, 1280])
async def test_nothing_sticks_out_at_any_width(home: Page, host: Host, width: int) -> None:
    probe = await arm(home, host)
    await host.hit(probe, 30, text="a rather long captured string " * 4)
    await home.set_viewport_size({"width": width, "height": 844})
    views = home.get_by_role("navigation", name="Views")
    for name in ("Probes", "Live", "Hosts"):
        if width <= 900:
            await button(views, name).click()
        where = {"Probes": "probe", "Live": "tail", "Hosts": "host"}[name]
        await expect(home.get_by_test_id(where)).to_be_visible()
        assert await home.evaluate("document.documentElement.scrollWidth") == width
        cut_off = await home.evaluate(
            "[...document.querySelectorAll('button, input, select')].filter(e => e.checkVisibility()"
            " && !e.closest('.captures') && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)"
        )
        assert cut_off == []


async def test_every_control_has_a_name(home: Page, host: Host) -> None:
    await arm(home, host)
    nameless = await home.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter(e => !(e.getAttribute('aria-label')"
        " || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []


async def test_the_first_load_is_small(built: None) -> None:
    def size() -> int:
        files = [p for p in STATIC.rglob("*") if p.suffix in (".html", ".js", ".css", ".svg")]
        return sum(len(gzip.compress(p.read_bytes())) for p in files)

    assert 10_000 < await asyncio.to_thread(size) < 150_000
