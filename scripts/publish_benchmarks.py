"""Benchmark pages that need no network: `asv publish`, then what its pages load from elsewhere is put beside them.

    python scripts/publish_benchmarks.py            asv_bench/results into asv_bench/html
    python scripts/publish_benchmarks.py --check    and open them in Chromium, which may reach this machine alone
    python -m http.server -d asv_bench/html         to look at them

The files come from npm packages, fetched once into asv_bench/vendor; npm checks them by their hashes.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "asv_bench"
VENDOR = BENCH / "vendor"
SECONDS = 120
# what the page's address ends in: the package that has it, and where
FILES = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
TAG = re.compile(r'(?P<head><(?:script|link)[^>]*?(?:src|href)=")(?P<address>https?://[^"]+)"(?P<rest>[^>]*)>')
ATTRIBUTES = re.compile(r' (?:integrity|crossorigin|referrerpolicy)="[^"]*"')


def fetch() -> None:
    """Every file into the folder of vendors, unless it is there."""
    VENDOR.mkdir(exist_ok=True)
    wanted = {name: place for name, place in FILES.items() if not (VENDOR / name).exists()}
    with tempfile.TemporaryDirectory() as folder:
        for package in dict.fromkeys(package for package, _ in wanted.values()):
            done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True,
                                  check=True, timeout=SECONDS)  # fmt: skip
            with tarfile.open(Path(folder) / done.stdout.split()[-1]) as archive:
                for name, (of, place) in wanted.items():
                    member = archive.extractfile(f"package/{place}") if of == package else None
                    if member is not None:
                        (VENDOR / name).write_bytes(member.read())


def localised(page: str) -> str:
    """The page with every script and style beside it. Raises ValueError for one that nobody has."""

    def tag(found: re.Match[str]) -> str:
        name = found["address"].rsplit("/", 1)[-1]
        if name not in FILES:
            raise ValueError(f"The page loads {found['address']}, which is in no package that is known here.")
        return f'{found["head"]}vendor/{name}"{ATTRIBUTES.sub("", found["rest"])}>'

    return TAG.sub(tag, page)


def publish() -> Path:
    """asv's pages, localised; their folder."""
    html = BENCH / "html"
    subprocess.run(["asv", "publish"], cwd=BENCH, check=True)
    fetch()
    shutil.copytree(VENDOR, html / "vendor", dirs_exist_ok=True)
    for file in html.glob("*.html"):
        file.write_text(localised(file.read_text(encoding="utf-8")), encoding="utf-8")
    return html


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


def check(html: Path) -> int:
    """Whether a browser without a network draws the list of benchmarks."""
    browser = next((x for x in ("chromium", "chromium-browser", "google-chrome") if shutil.which(x)), None)
    if browser is None:
        print("SKIPPED, the pages were not opened: no Chromium here.")
        return 0
    handler = functools.partial(Quiet, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as home:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}",
                   "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000",
                   "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/index.html"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        server.shutdown()
    benchmarks = json.loads((html / "index.json").read_text(encoding="utf-8"))["benchmarks"]
    missing = [name for name in benchmarks if name.rsplit(".", 1)[-1] not in done.stdout]
    if not benchmarks or missing or "error.html" in done.stdout.partition("</head>")[2]:
        print(f"The page does not show {missing or 'any benchmark'}:\n{done.stdout[:2000]}{done.stderr[-1000:]}")
        return 1
    print(f"{len(benchmarks)} benchmarks shown without a network.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="open the pages in a browser that has no network")
    options = parser.parse_args()
    html = publish()
    return check(html) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
