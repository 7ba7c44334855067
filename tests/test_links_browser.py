"""What only a real JupyterLab shows: links to the glossary, and a slider that draws its frames."""

import nbformat
import pytest
from browser import ARTIFACTS, Tab, chromium, jupyterlab
from nbformat import v4

from notebooks import pairs

DRAWING = """import lesson
from matplotlib import pyplot as plt
plt.plot([1, 2])
lesson.show("a line that rises from one to two")
lesson.frames(lambda axes, n: axes.plot(range(n)), [2, 3, 4], "points", "a line of n points")"""


@pytest.mark.slow
def test_a_slider_draws_and_a_link_leads_to_its_term(tmp_path):
    cells = [
        v4.new_markdown_cell("A [residual stream](glossary.ipynb#residual-stream)."),
        v4.new_code_cell(DRAWING),
    ]
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": pairs.KERNEL})
    nbformat.validate(notebook)
    with chromium("links") as browser, jupyterlab(notebook, tmp_path) as address:
        tab = Tab(browser, address)
        tab.run_all()
        tab.page.locator('img[alt^="points 2. a line of n points"]').wait_for()
        slider = tab.page.locator(".widget-hslider .noUi-handle")
        slider.press("ArrowRight")
        tab.page.locator('img[alt^="points 3. a line of n points"]').wait_for()
        tab.page.screenshot(path=ARTIFACTS / "links-figures.png")
        tab.page.locator("a", has_text="residual stream").first.click()
        term = tab.page.locator("h3", has_text="residual stream")
        term.wait_for()
        # JupyterLab looks for the heading before it has rendered the page: it jumps from then on.
        tab.page.locator(".lm-TabBar-tabLabel", has_text="chapter.ipynb").first.click()
        tab.page.locator("a", has_text="residual stream").first.click()
        tab.page.wait_for_function(
            "() => [...document.querySelectorAll('h3')].some(h => h.innerText.includes('residual')"
            " && h.getBoundingClientRect().top > 0"
            " && h.getBoundingClientRect().top < window.innerHeight)"
        )
        tab.page.screenshot(path=ARTIFACTS / "links-glossary.png")
