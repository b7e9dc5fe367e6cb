"""From the page to a running program and back: real browser, service, agent, tracer and target."""

from __future__ import annotations

import asyncio
import re

import pytest
from playwright.async_api import Browser, expect

from tests.support import needs
from tests.system.stack import Stack, breakpoints, caller

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs.chromium, needs.node, needs.ptrace_any]


async def test_find_arm_see_and_take_out(browser: Browser, built: None) -> None:
    with Stack() as stack, caller() as child:
        page = await browser.new_page(viewport={"width": 1280, "height": 800})
        await page.goto(f"{stack.url}/#token={stack.token}")
        await expect(page.get_by_test_id("link-state")).to_have_text("Live")

        # find: the process by its pid, the function by a few of its letters
        await page.get_by_label("Search processes").fill(str(child.pid))
        await page.get_by_test_id("process").get_by_title(re.compile(f"Probe only pid {child.pid}\n")).click()
        text = page.get_by_test_id("probe-text")
        await expect(text).to_have_value(re.compile(f"pid={child.pid}"))
        await text.fill(f"libc.so.6:getppid @ pid={child.pid}")
        await page.keyboard.press("Escape")

        # arm
        await page.get_by_role("button", name="Arm probe", exact=True).click()
        row = page.get_by_test_id("probe")
        await expect(row).to_have_attribute("data-phase", "Armed")
        assert len(breakpoints(child.pid)) >= 1

        # see: as many hits as the program made calls
        await asyncio.to_thread(child.ask, "call 250")
        await expect(page.get_by_test_id("fact-hits")).to_contain_text("250")
        await expect(page.get_by_test_id("tail")).to_contain_text("libc.so.6:getppid")
        assert stack.client.probes()[0].status.counters.dropped == 0

        # take out
        await row.get_by_role("button", name="Remove getppid", exact=True).click()
        await row.get_by_role("button", name="Remove", exact=True).click()
        await expect(page.get_by_test_id("probe")).to_have_count(0)
        assert breakpoints(child.pid) == []
        assert await asyncio.to_thread(child.ask, "call 5") == "255"
        await page.close()
