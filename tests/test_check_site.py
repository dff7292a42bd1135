"""The look at the built pages finds what it is for: faults planted in a small site, each named."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("check_site", ROOT / "scripts" / "check_site.py")
check_site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_site)

BROWSER = next(filter(None, map(shutil.which, check_site.BROWSERS)), None)
STYLE = (
    "body{margin:8px;background:#fff;color:#222}a{color:inherit}code{background:#eee}"
    'html[data-theme="dark"] body{background:#111;color:#ddd}html[data-theme="dark"] code{background:#333}'
)
HEAD = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><link rel='icon' href='data:,'>"
# a picture of 8 x 8 dots with a line in it, for the day: dark on nothing
FIGURE = (
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'>"
    "<path d='M8 56L56 8' stroke='%23222' stroke-width='6'/></svg>"
)
PAGES = {
    "index.html": '<p id="here"><code>well</code> <a href="#here">here</a> <a href="other.html#there">there</a></p>',
    "other.html": '<p id="there"><a href="index.html">back</a> <a href="https://example.org/">elsewhere</a></p>'
    '<div style="overflow-x:auto"><div style="width:2000px">a wide thing in its own box</div></div>',
    "search.html": '<div id="search-results"></div><script>if (location.search.includes("cosformer"))'
    'document.getElementById("search-results").innerHTML = "<li><a href=index.html>found</a></li>"</script>',
}
PLANTED = {
    "link.html": ('<a href="gone.html">x</a>', "the link gone.html leads nowhere"),
    "place.html": ('<a href="other.html#gone">x</a>', "other.html#gone: no such place"),
    "console.html": ("<p>x</p><script>console.error('a planted word')</script>", "console: a planted word"),
    "thrown.html": ("<p>x</p><script>throw new Error('thrown here')</script>", "exception: Error: thrown here"),
    "missing.html": ('<p>x</p><script src="data:text/javascript,fetch(`/gone.json`)"></script>', "404"),
    "abroad.html": ('<p>x</p><img alt="x" src="http://192.0.2.1/x.png">', "asks another site: http://192.0.2.1/x.png"),
    "wide.html": ('<p>x</p><div class="slab" style="width:600px">wide</div>', "390 px wide: the page is 6"),
    "night.html": ('<p style="color:#333">dark on dark</p>', "dark: contrast 1.5, less than 4.5: <p"),
    "day.html": ('<p style="color:#bbb">pale on white</p>', "light: contrast 1.9, less than 4.5: <p"),
    "figure.html": (f'<p>x</p><img alt="line" src="{FIGURE}">', "dark: a figure does not stand out"),
    "formula.html": ('<p>x</p><span class="math">\\(x^2\\)</span>', "a formula is not set"),
}


def write(folder, pages):
    for name, body in pages.items():
        head = f"{HEAD}<title>{name}</title><style>{STYLE}</style>"
        (folder / name).write_text(f"<!doctype html><html>{head}<body>{body}</body></html>", encoding="utf-8")


def test_links_are_read_off_the_files(tmp_path):
    write(tmp_path, PAGES)
    assert check_site.broken_links(tmp_path) == []
    write(tmp_path, {name: body for name, (body, _) in PLANTED.items()})
    found = check_site.broken_links(tmp_path)
    assert [fault.partition(":")[0] for fault in found] == ["link.html", "place.html"]
    assert all(PLANTED[fault.partition(":")[0]][1] in fault for fault in found)


def test_without_a_browser_links_alone_are_checked_and_that_is_said(tmp_path, monkeypatch, capsys):
    write(tmp_path, PAGES)
    monkeypatch.setattr(check_site, "BROWSERS", ("no-such-browser",))
    monkeypatch.setattr("sys.argv", ["check_site.py", str(tmp_path)])
    assert check_site.main() == 0
    assert "SKIPPED: no Chromium here" in capsys.readouterr().out


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_planted_faults_are_found(tmp_path):
    """One browser for all: a clean page has no fault, every planted one has its own and no other page has it."""
    write(tmp_path, PAGES | {name: body for name, (body, _) in PLANTED.items()})
    looked_at, faults = check_site.check(tmp_path, BROWSER, "cosformer", tmp_path / "shots")
    assert looked_at == len(PAGES) - 1 + len(PLANTED)
    by_page = {name: [fault for fault in faults if fault.startswith(f"{name}: ")] for name in (*PAGES, *PLANTED)}
    assert [name for name in PAGES if by_page[name]] == []
    for name, (_, said) in PLANTED.items():
        assert any(said in fault for fault in by_page[name]), (name, by_page[name])
    assert sum(map(len, by_page.values())) == len(faults)
    assert len(list((tmp_path / "shots").glob("*.png"))) == 3 * looked_at


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_search_that_finds_nothing(tmp_path):
    write(tmp_path, {name: PAGES[name] for name in ("search.html",)})
    assert check_site.check(tmp_path, BROWSER, "nowhere")[1] == ["search.html: the search does not find nowhere"]
