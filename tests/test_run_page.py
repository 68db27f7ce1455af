"""The page of finished runs: what it shows, in a real browser, and that names cannot change it."""

from __future__ import annotations

import numpy as np

from nerfstudio_softmining.bench.run_page import Run, View, page

NASTY = "<script>alert(1)</script>'\"&"


def make_run(name: str, psnr: float = 20.0, **curves) -> Run:
    values = np.linspace(0, 1, 24 * 32 * 3).reshape(24, 32, 3)
    views = [View(number, values, 1 - values, psnr + number, 0.5) for number in (0, 3)]
    return Run(name, {"data": name, "alpha": 0.8, "seed": None}, curves, None, views)


def test_names_are_text():
    content = page([make_run(NASTY)])
    assert "<script>alert" not in content and "&lt;script&gt;alert(1)" in content
    assert "--vis viewer+tensorboard" in content  # there are no curves


def test_the_worst_view_is_first():
    content = page([make_run("a")])
    assert content.index("View 0: 20.00 dB") < content.index("View 3: 23.00 dB")


def test_a_browser_shows_it_without_a_network_and_the_slider_uncovers_the_truth(browser, tmp_path):
    curves = {"Train Metrics Dict/psnr": ([0, 10, 20], [10.0, 12.0, 14.0])}
    (tmp_path / "page.html").write_text(page([make_run("first", **curves), make_run(NASTY, 22.0, **curves)]))
    tab, asked, wrong = browser.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(f"file://{tmp_path}/page.html")
    tab.locator(".js-plotly-plot .scatterlayer .trace").nth(1).wait_for(timeout=60_000)
    render, slider = tab.get_by_alt_text("render").first, tab.get_by_label("truth or render").first
    assert render.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 0px 0px 50%)"
    slider.fill("80")
    assert render.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 0px 0px 80%)"
    assert wrong == [] and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
