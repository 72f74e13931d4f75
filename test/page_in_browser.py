#!/usr/bin/env python3
"""Uses every control of the page in Chromium, for test_page.cpp: page_in_browser.py FOLDER [SCREENSHOTS].

FOLDER holds run.html, of a run with a record; random.html with want.json, what the trainer says of its model;
large.html and one.html, whose vocabularies have 5000 characters and one; and hostile.html, with a text that would break it. Prints what is wrong, and ends with code 1 then.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FOLDER = Path(sys.argv[1])
SCREENSHOTS = Path(sys.argv[2]) if len(sys.argv) > 2 else None
wrong = []


def check(holds, *what):
    if not holds:
        wrong.append(" ".join(map(str, what)))
        print("wrong:", *what)


def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(argument)
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)


class Page:
    def __init__(self, driver, name):
        self.driver, self.name = driver, name
        driver.get((FOLDER / name).resolve().as_uri())
        self.until(lambda: self.js("return document.documentElement.dataset.ready === 'yes' && !busy"), "it is ready")

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def ask(self, what, request):
        return self.driver.execute_async_script(
            "const done = arguments[2]; ask(arguments[0], arguments[1]).then(a => done(JSON.stringify(a, (key, value) => "
            "value instanceof Float32Array ? Array.from(value) : value)))", what, request)

    def until(self, holds, what, seconds=60):
        end = time.time() + seconds
        while time.time() < end:
            if holds():
                return
            time.sleep(0.02)
        check(False, self.name + ": waited in vain until", what)

    def rest(self):
        self.until(lambda: self.js("return !busy"), "it rests")

    def find(self, id):
        return self.driver.find_element(By.ID, id)

    def text(self, id):
        return self.js("return document.getElementById(arguments[0]).textContent", id)

    def type(self, words, clear=True):
        field = self.find("text")
        if clear:
            self.js("const t = document.getElementById('text'); t.value = ''; t.focus(); t.dispatchEvent(new Event('input'))")
        field.send_keys(words)
        self.rest()

    def set(self, id, value):
        self.js("const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))",
                id, str(value))

    def quiet(self):
        """Nothing in the console, and no request but for the page itself."""
        for entry in self.driver.get_log("browser"):
            check(False, self.name, "console:", entry["message"])
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                check(url.startswith(("file:", "blob:", "data:")), self.name, "asks for", url[:100])


def look(page):
    page.type("abababa")
    boxes = page.js("return [...document.getElementById('characters').children].map(c => [c.textContent, c.title])")
    check([b[0] for b in boxes] == list("abababa"), "characters", boxes)
    check(not boxes[0][1] and all("nats" in b[1] for b in boxes[1:]), "losses", boxes)
    check("nats a character" in page.text("mean"), "mean", page.text("mean"))
    slider = page.find("characters")
    check(slider.get_attribute("aria-valuenow") == "7", "the newest character is chosen")
    slider.send_keys(Keys.ARROW_LEFT)
    page.rest()
    check(slider.get_attribute("aria-valuetext").startswith("b, 6 of 7"), slider.get_attribute("aria-valuetext"))
    check("and it does" in page.text("next"), "the truth among the likeliest", page.text("next"))
    slider.send_keys(Keys.HOME)
    page.rest()
    check(slider.get_attribute("aria-valuenow") == "1", "Home")
    slider.find_elements(By.TAG_NAME, "span")[3].click()
    page.rest()
    check(slider.get_attribute("aria-valuenow") == "4", "a click")

    layers = page.js("return record.settings.n_layer")
    heads = page.driver.find_elements(By.CSS_SELECTOR, "#heads button")
    check(len(heads) == int(layers) * int(page.js("return record.settings.n_head")), "maps", len(heads))
    heads[-1].click()
    check(page.text("head-title") == f"Layer {layers}, head {len(heads) // int(layers)}", page.text("head-title"))
    check(heads[-1].get_attribute("aria-pressed") == "true", "pressed")
    enlarged = page.find("enlarged")
    enlarged.send_keys(Keys.ARROW_UP)
    check(page.text("cell").startswith("a (3) looks at "), page.text("cell"))
    ActionChains(page.driver).move_to_element_with_offset(page.find("map"), -40, 20).perform()
    check(len(page.driver.find_elements(By.CSS_SELECTOR, "#characters .looked")) in (1, 2), "hover marks two characters")
    sums = page.js("return maps.heads.flat().map(h => Array.from(h.slice(4 * maps.n, 5 * maps.n)).reduce((a, b) => a + b))")
    check(all(abs(s - 1) < 1e-5 for s in sums), "rows of attention", sums)
    rows = page.driver.find_elements(By.CSS_SELECTOR, "#layers tbody tr")
    check(len(rows) == 1 + int(layers), "layers", len(rows))

    page.type("aböb")
    check("ö" in page.text("note") and page.js("return tokens.length") == 3, "unknown", page.text("note"))
    page.type("")
    check("Type something" in page.text("note") and not page.find("write").is_enabled(), "empty", page.text("note"))
    page.type("ab" * 20)
    check("The model sees the last" in page.text("note"), "longer than the window", page.text("note"))
    check(page.driver.find_elements(By.CSS_SELECTOR, "#characters .unseen"), "grey characters")


def write(page):
    page.type("ab")
    page.set("count", 40)
    page.set("top-k", 2)
    page.set("temperature", 0.5)
    page.set("seed", "no number")
    check("The seed is" in page.text("command") and not page.find("write").is_enabled(), page.text("command"))
    page.set("seed", 7)
    check(page.text("command") == "./train_gpt sample --start 'ab' --max_new_tokens 40 --temperature 0.5 --top_k 2 --seed 7",
          page.text("command"))
    texts = []
    for _ in range(2):
        page.find("write").click()
        page.until(lambda: page.find("write").is_enabled(), "it has written")
        texts.append(page.text("written"))
    check(len(texts[0]) == 42 and texts[0] == texts[1], "written", texts)
    check("parts from the program" in page.text("parts"), "parts", page.text("parts"))
    page.js("document.getElementById('exact').click()")
    page.find("write").click()
    page.until(lambda: page.find("write").is_enabled(), "it has written exactly")
    check(page.text("parts") == "" and len(page.text("written")) == 42, "exact", page.text("written"))
    page.js("document.getElementById('exact').click()")
    page.set("count", 100000)
    page.find("write").click()
    page.until(lambda: len(page.text("written")) > 100, "it writes")
    page.find("stop").click()
    page.until(lambda: page.find("write").is_enabled(), "it stops")
    check(len(page.text("written")) < 100000, "stopped")
    check("a second" in page.text("speed"), page.text("speed"))


def learned(page):
    slider = page.find("evaluation")
    last = page.text("sample")
    slider.send_keys(Keys.HOME)
    check(page.text("step").startswith("0 steps") and page.text("sample") != last, "slider", page.text("step"))
    check(page.js("return document.querySelectorAll('#curves polyline').length") == 3, "curves")
    check("uniform" in page.text("curves") and "5-gram" in page.text("curves"), "baselines")
    check("qkvw" in page.text("made") and "--n_layer" in page.text("made") and "exact" in page.text("made"), "made")


def accessible(page):
    """Names for all that can be used, one main heading, headings that leave out no level, text that stands out."""
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    for node in page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in ("button", "textbox", "slider", "checkbox", "spinbutton", "image", "table"):
            check(node.get("name", {}).get("value"), page.name, role, "has no name")
    levels = page.js("return [...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    check(levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:])), levels)
    ids = page.js("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    check(len(ids) == len(set(ids)), "ids occur twice")
    contrasts = page.js("""
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 :
          ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if (!c.startsWith('rgba')) return c; } };
      return ['h1', 'p', '#about', 'textarea', 'button', 'pre', 'code', 'td', '#legend', '.layer'].map(s => {
        const e = document.querySelector(s), a = light(getComputedStyle(e).color), b = light(back(e));
        return [s, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; });""")
    for what, ratio in contrasts:
        check(ratio >= 4.5, page.name, "contrast of", what, ratio)


def shapes(page):
    """No sideways scrolling at any width; a screenshot of each, and one in the dark."""
    for width in (360, 800, 1280):
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        check(page.js("return document.documentElement.scrollWidth") <= width, "wider than the window of", width)
        picture(page, f"{width}")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    check(page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 27)", "dark")
    accessible(page)
    picture(page, "dark")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def picture(page, name):
    if not SCREENSHOTS:
        return
    import base64
    shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def same_model(page):
    want = json.loads((FOLDER / "want.json").read_text())
    for tokens, logits in zip(want["texts"], want["logits"]):
        got = json.loads(page.ask("logits", {"tokens": tokens}))["logits"]
        worst = max(abs(a - b) for a, b in zip(got, logits))
        check(len(got) == len(logits) and worst < 2e-3, "logits differ by", worst)
    page.js("""document.getElementById('text').value = arguments[0]; document.getElementById('exact').checked = true;
               textChanged();""", want["prompt"])
    for id, value in (("count", 200), ("temperature", 0), ("top-k", 0)):
        page.set(id, value)
    page.find("write").click()
    page.until(lambda: page.find("write").is_enabled(), "it has written")
    check(page.text("written") == want["prompt"] + want["greedy"], "greedy text", page.text("written"), want["greedy"])


def hostile(page):
    """Signs of HTML in the text and in the samples are text, and nothing of them has run."""
    check(page.js("return document.querySelectorAll('script').length") == 4, "scripts")
    check(page.text("sample") == "<b>", page.text("sample"))
    slider = page.find("evaluation")
    slider.send_keys(Keys.HOME)
    check(page.text("step") == "0 steps" and page.text("sample").startswith("</script>"), page.text("step"))


driver = browser()
try:
    driver.set_script_timeout(60)
    run = Page(driver, "run.html")
    for use in (look, write, learned, accessible, shapes):
        use(run)
    run.quiet()
    for name, use in (("random.html", same_model), ("large.html", None), ("one.html", None), ("hostile.html", hostile)):
        page = Page(driver, name)
        check(len(page.text("characters")) > 0, name, "shows no characters")
        if use:
            use(page)
        page.quiet()
finally:
    driver.quit()
print(f"{len(wrong)} wrong")
sys.exit(bool(wrong))
