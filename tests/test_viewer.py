"""The panel in nerfstudio's live viewer, in a real browser."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from nerfstudio_softmining.demo.scene import write_scene

TIMEOUT = 120_000
"""Milliseconds that the page may take for anything."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def lines_with(log: Path, text: str) -> list[str]:
    """Lines of a log with a text, without the line breaks of a narrow terminal."""
    content = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(errors="replace"))
    return [line for line in content.splitlines() if text in line]


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_a_browser_changes_reaches_the_training(browser, tmp_path):
    write_scene(tmp_path / "scene", num_train=4, num_eval=1, size=48)
    port, log = free_port(), tmp_path / "log.txt"
    command = f"""{Path(sys.executable).parent}/ns-train softmining-nerfacto-lite-blender --data {tmp_path}/scene
        --output-dir {tmp_path}/outputs --viewer.websocket-port {port} --max-num-iterations 100000
        --pipeline.datamanager.train-num-rays-per-batch 64 --pipeline.model.log2-hashmap-size 10""".split()
    with log.open("w") as file:
        training = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "300"})
    try:
        wait_for(lambda: training.poll() is not None or lines_with(log, "Step (% Done)"))
        assert training.poll() is None, log.read_text()[-3000:]
        page = browser.new_page(viewport={"width": 1400, "height": 2400})
        page.goto(f"http://localhost:{port}", timeout=TIMEOUT)
        page.get_by_text("Where rays go", exact=True).wait_for(timeout=TIMEOUT)
        page.get_by_text(re.compile(r"rays follow chains")).wait_for(timeout=TIMEOUT)
        page.get_by_text(re.compile(r"of the chains started anew")).wait_for(timeout=TIMEOUT)
        page.get_by_text("Weighted loss").first.wait_for(timeout=TIMEOUT)

        page.get_by_text("Alpha", exact=True).locator("xpath=ancestor::*[.//input][1]//input").last.fill("0.25")
        wait_for(lambda: lines_with(log, "Soft mining: alpha is 0.25 from step"))
        page.get_by_text("alpha now 0.25").wait_for(timeout=TIMEOUT)

        page.get_by_text("Sampler", exact=True).locator("xpath=ancestor::*[.//input][1]//input").first.click()
        page.get_by_text("uniform (soft mining off)").click()
        page.get_by_text("100% are uniform").wait_for(timeout=TIMEOUT)
        wait_for(lambda: lines_with(log, "sampler is uniform (soft mining off)"))

        page.locator(".js-plotly-plot .layer-above image, .js-plotly-plot image").first.wait_for(timeout=TIMEOUT)
        page.get_by_text("Worst views").wait_for(timeout=TIMEOUT)
        page.get_by_text("Errors at cameras").locator("xpath=ancestor::*[.//input][1]//input").click()
        before = int(page.get_by_text(re.compile(r"^Step \d+$")).inner_text().split()[1])
        page.get_by_text(re.compile(rf"^Step (?!{before}$)\d+$")).wait_for(timeout=TIMEOUT)
        page.screenshot(path=tmp_path / "panel.png")
    finally:
        training.kill()
        training.wait()
    assert "Traceback" not in log.read_text()
