"""Screenshots of `qadapter play`: python benchmarks/play_screenshots.py runs/demo docs

One message is answered at strength 1, and at 0.3. Wants Debian's `chromium`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

MESSAGE = "What is the moon?"


def main(adapter: str, output: str) -> None:
    """Write play.png and play-low.png into `output`."""
    command = [sys.executable, "-m", "qadapter.cli", "play", adapter, "--port", "0"]
    command += ["--max-new-tokens", "80"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    try:
        found = re.match(r"http://\S+", program.stdout.readline())
        if found is None:
            sys.exit("`qadapter play` did not start")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1100, "height": 720})
            page.goto(found.group(), timeout=120_000)
            page.locator("#message textarea").fill(MESSAGE)
            for name, strength in (("play.png", "1"), ("play-low.png", "0.3")):
                page.locator("#strength-1 input[type=number]").fill(strength)
                page.locator("#ask").click()
                # Until neither answer has grown for two seconds.
                before, now = [""], page.locator(".answer").all_inner_texts()
                while now != before or not now[-1]:
                    page.wait_for_timeout(2000)
                    before, now = now, page.locator(".answer").all_inner_texts()
                page.locator("#policy .answer span").nth(3).hover()
                page.screenshot(path=Path(output) / name)
            browser.close()
    finally:
        program.terminate()
        program.wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
