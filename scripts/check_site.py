"""Look at the built pages as a reader does, in a headless Chromium: python scripts/check_site.py SITE [--shots FOLDER]

Of every page: links lead to pages and places that exist; nothing fails or complains while it loads, and nothing is
asked of another site; every formula is set; at the width of a desk and of a phone it does not scroll sideways; by day
and by night text, formulas and figures stand out from what is behind them. The search finds a term. Without Chromium
the links alone are checked, and that is said. Exit status 1 if a fault is found.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

BROWSERS = "chromium", "chromium-browser", "google-chrome"
DESK, PHONE = (1280, 800), (390, 844)
LISTINGS = "_modules/"  # pages of source code: one in so many is looked at, their links all
EVERY = 10
PATIENCE = 30.0  # seconds for a page
SHOWN = 5  # faults of one kind on one page
START = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3])
os.dup2(r, 3), os.dup2(w, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
LOOK = (Path(__file__).resolve().parent / "check_site.js").read_text(encoding="utf-8")


# -- links, read off the files --------------------------------------------------------------------------------------


class Anchors(HTMLParser):
    """Where a page's links go, and the places in it that links can go to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "top"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value and tag != "base":
                self.links.append(value)
            elif (name == "id" or (tag == "a" and name == "name")) and value:
                self.places.add(value)


def pages_of(site: Path) -> list[Path]:
    """What a reader can come to; the theme keeps templates among its files."""
    return [page for page in sorted(site.rglob("*.html")) if "_static" not in page.relative_to(site).parts]


def read(page: Path) -> Anchors:
    anchors = Anchors()
    anchors.feed(page.read_text(encoding="utf-8"))
    return anchors


def broken_links(site: Path) -> list[str]:
    pages = {page.relative_to(site).as_posix(): read(page) for page in pages_of(site)}
    faults = []
    for name, anchors in pages.items():
        for link in sorted(set(anchors.links)):
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target, place = urldefrag(urljoin("/" + name, link))
            target = unquote(urlsplit(target).path).lstrip("/")
            target += "index.html" if target.endswith("/") or not target else ""
            if not (site / target).is_file():
                faults.append(f"{name}: the link {link} leads nowhere")
            elif target in pages and unquote(place) not in pages[target].places:
                faults.append(f"{name}: {link}: no such place there")
    return faults


# -- the browser ----------------------------------------------------------------------------------------------------


class Browser:
    """Chromium over the two pipes of --remote-debugging-pipe: JSON, a zero byte after each message."""

    def __init__(self, program: str, profile: str) -> None:
        theirs, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
            "--force-color-profile=srgb", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs), str(theirs_out), program, *options],
            pass_fds=(theirs, theirs_out), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs), os.close(theirs_out)
        self.count, self.rest, self.session = 0, b"", ""
        self.replies: dict[int, Any] = {}
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while self.count not in self.replies:
            if time.monotonic() > end:
                raise TimeoutError(f"{method} was not answered in {PATIENCE:.0f} s.")
            self.receive()
        reply = self.replies.pop(self.count)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def receive(self) -> None:
        chunk = os.read(self.ours_in, 1 << 20)
        if not chunk:
            raise RuntimeError("The browser has ended.")
        *messages, self.rest = (self.rest + chunk).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self.replies[message["id"]] = message
            else:
                self.events.append(message)

    def wait(self, method: str) -> None:
        end = time.monotonic() + PATIENCE
        while all(event["method"] != method for event in self.events):
            if time.monotonic() > end:
                raise TimeoutError(f"No {method} in {PATIENCE:.0f} s.")
            self.receive()

    def evaluate(self, code: str) -> Any:
        found = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def size(self, width: int, height: int) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.ours_out), os.close(self.ours_in)


@contextmanager
def opened(program: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            yield browser
        finally:
            browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files that may be kept: a page's scripts are loaded once for all pages."""

    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site on this machine: a search loads pages, which files may not."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def complaints(events: list[dict[str, Any]], address: str) -> Iterator[str]:
    """What went wrong while a page was loaded, or was asked of another site."""
    for event in events:
        said = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown":
                details = said["exceptionDetails"]
                yield "exception: " + details.get("exception", {}).get("description", details["text"]).split("\n")[0]
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "assert"):
                yield "console: " + " ".join(str(x.get("value", x.get("description", ""))) for x in said["args"])
            case "Log.entryAdded" if said["entry"]["level"] == "error":
                yield f"log: {said['entry']['text']} {said['entry'].get('url', '')}"
            case "Network.requestWillBeSent":
                url = said["request"]["url"]
                if not url.startswith((address, "data:", "blob:", "about:")):
                    yield f"asks another site: {url}"


def visit(browser: Browser, address: str, name: str) -> list[str]:
    """Load a page, wait until it is set, and collect complaints."""
    browser.events.clear()
    browser("Page.navigate", url=address + name)
    browser.wait("Page.loadEventFired")
    browser.evaluate(LOOK)
    browser.evaluate("look.ready()")
    return list(complaints(browser.events, address))


def look(browser: Browser, address: str, name: str, shots: Path | None) -> list[str]:
    """All faults of one page."""
    browser.size(*DESK)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    faults = visit(browser, address, name) + browser.evaluate("look.formulas()")
    for (width, height), mode in ((DESK, "light"), (DESK, "dark"), (PHONE, "dark")):
        browser.size(width, height)
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
        if (width, mode) != (DESK[0], "dark"):
            faults += [f"{width} px wide: {x}" for x in browser.evaluate("look.overflow()")]
        if (width, mode) != (PHONE[0], "dark"):
            faults += [f"{mode}: {x}" for x in browser.evaluate(f"look.contrast('{mode}')")]
        if shots:
            shots.mkdir(parents=True, exist_ok=True)
            picture = browser("Page.captureScreenshot", format="png")["data"]
            page = name.removesuffix(".html").replace("/", "-")
            (shots / f"{page}-{width}-{mode}.png").write_bytes(base64.b64decode(picture))
    return faults


def search(browser: Browser, address: str, term: str) -> list[str]:
    faults = visit(browser, address, f"search.html?q={term}")
    if not browser.evaluate("look.found()"):
        faults.append(f"the search does not find {term}")
    for mode in ("light", "dark"):
        faults += [f"{mode}: {x}" for x in browser.evaluate(f"look.contrast('{mode}')")]
    return faults


def chosen(site: Path) -> list[str]:
    """The pages a browser looks at: all, and some of the source listings."""
    pages = [page.relative_to(site).as_posix() for page in pages_of(site)]
    listings = [name for name in pages if name.startswith(LISTINGS)]
    return [name for name in pages if name not in listings and name != "search.html"] + listings[::EVERY]


def check(site: Path, program: str | None, term: str, shots: Path | None = None) -> tuple[int, list[str]]:
    """How many pages were looked at, and the faults."""
    if program is None:
        return 0, broken_links(site)
    names, faults = chosen(site), []
    with ThreadPoolExecutor(1) as beside, served(site) as address, opened(program) as browser:
        links = beside.submit(broken_links, site)  # while the browser is at work
        for name in names:
            found = look(browser, address, name, shots)
            faults += [f"{name}: {x}" for x in found[: 3 * SHOWN]]
        if (site / "search.html").exists():
            faults += [f"search.html: {x}" for x in search(browser, address, term)]
        faults += links.result()
    return len(names), faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder with index.html")
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="screenshots of every page go here")
    parser.add_argument("--term", default="cosformer", help="what the search must find")
    options = parser.parse_args()
    if not (options.site / "index.html").is_file():
        parser.error(f"{options.site} has no index.html")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    start = time.perf_counter()
    looked_at, faults = check(options.site.resolve(), program, options.term, options.shots)
    print("\n".join(faults), end="\n" if faults else "")
    if program is None:
        print("SKIPPED: no Chromium here; links alone were checked.")
    print(f"{len(faults)} faults; {looked_at} pages looked at in {time.perf_counter() - start:.0f} s.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
