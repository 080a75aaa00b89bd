"""A page in a real browser, where one is installed: what it would load, whether its pictures show, whether it overflows."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
# The page stands in a frame of the width asked for. The policy, which the frame inherits, refuses whatever is not in the page
# itself and tells of it.
HARNESS = """<!doctype html>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
      script-src 'unsafe-inline'">
<body><pre id="found"></pre><script>
const page = PAGE;
const widths = WIDTHS;
const found = {};
function measure(width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
    frame.onload = () => {  // every picture has arrived or failed
      const view = frame.contentDocument;
      const images = [...view.images];
      found[width] = {
        refused: frame.refused || [],
        loaded: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name)
          .filter(name => !name.startsWith("data:")),
        images: images.length,
        broken: images.filter(image => !image.complete || !image.naturalWidth).length,
        silent: images.filter(image => !image.alt).length,
        overflow: view.documentElement.scrollWidth - view.documentElement.clientWidth,
        dead_links: [...view.querySelectorAll("a[href^='#']")]
          .filter(link => !view.getElementById(decodeURIComponent(link.hash.slice(1)))).length,
        links: view.querySelectorAll("a[href^='#']").length,
      };
      done();
    };
    frame.srcdoc = page.replace("<head>", "<head><script>document.addEventListener('securitypolicyviolation', event => "
      + "(frameElement.refused = frameElement.refused || []).push(event.blockedURI))<\\/script>");
    document.body.append(frame);
  });
}
(async () => {
  for (const width of widths) await measure(width);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script></body>
"""


def browser() -> str | None:
    """A Chromium on the PATH, or one that Playwright has fetched."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    fetched = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache/ms-playwright")
    return next((str(path) for name in ("chrome", "headless_shell") for path in sorted(fetched.glob(f"*/*/{name}"))), None)


def look(program: str, page: str, folder: Path, widths: tuple[int, ...]) -> dict[str, dict]:
    """What the browser finds on the page at each width in pixels."""
    embedded = json.dumps(page).replace("</", "<\\/")
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("WIDTHS", json.dumps(widths)).replace("PAGE", embedded), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [program, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", harness.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, flags=re.S)
    assert match, done.stderr[-2000:]
    return json.loads(match[1])
