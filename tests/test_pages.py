"""Every page in a browser: axe-core finds nothing in it, in light and dark, and its script works.

Skips without Chromium; axe-core (npm install axe-core) is $CLIPSEG_RAY_AXE, its axe.min.js, or in
node_modules/ of the repository.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import classify, duplicates, embed, evaluate, label, search, segment, view
from pipeline.demo import MODEL, SHARDS
from pipeline.demo import truth as demo_truth
from tests.shards import make_tar

ROOT = Path(__file__).parent.parent
ONTOLOGY = ROOT / "pipeline" / "demo" / "ontology.yaml"
CHROMIUM = shutil.which("chromium")
AXE = Path(os.environ.get("CLIPSEG_RAY_AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUIET += ["--allow-file-access-from-files"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, of one bundled shard and a broken one; without axe-core the report of
    masks alone, which has all the script that there is."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "in").mkdir()
    (shard,) = SHARDS.glob("*.parquet")
    pq.write_table(pq.read_table(shard).slice(0, 12), folder / "in" / shard.name)
    (folder / "in" / "bad.tar").write_bytes(make_tar([("x.png", b"<html>")]))
    (folder / "labels.txt").write_text("red\nblue\ngreen\n")
    at = {n: str(folder / n) for n in ("in", "masks", "labels", "classes", "vectors")}
    run = ["--model", str(MODEL), "--local", "--quiet"]
    assert segment.main([at["in"], at["masks"], "--ontology", str(ONTOLOGY), *run]) == 0
    files = {n: folder / n / "report" / "index.html" for n in at if n != "in"}
    if not AXE.is_file():
        return {"masks": files["masks"]}
    cut = ["--ontology", str(ONTOLOGY), "--local", "--quiet"]
    assert label.main([at["masks"], at["labels"], *cut]) == 0
    some = ["--labels", f"{folder}/labels.txt", "--template", "{}", "--top", "2"]
    assert embed.main([at["in"], at["vectors"], "--text-column", "caption", *run]) == 0
    assert classify.main([at["vectors"], at["classes"], *some, *run]) == 0
    assert view.main([at["masks"], "--output", f"{folder}/view.html"]) == 0
    found = [at["vectors"], "--text", "a star", "--gallery", f"{folder}/gallery.html", "--quiet"]
    assert search.main(found) == 0
    groups = [at["vectors"], "--cosine", "0.7", "--gallery", f"{folder}/groups.html", "--quiet"]
    assert duplicates.main(groups) == 0
    demo_truth.main([f"{folder}/truth.json"])
    held = ["--ground-truth", f"{folder}/truth.json", "--output", f"{folder}/evaluation"]
    assert evaluate.main([at["masks"], *held, "--quiet"]) == 0
    files |= {n: folder / f"{n}.html" for n in ("view", "gallery", "groups")}
    return files | {"evaluation": folder / "evaluation" / "evaluation.html"}


def browse(page: Path, *options: str) -> str:
    """The document after its scripts have run."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(CHROMIUM), *QUIET, profile, *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    return done.stdout.decode()


def without_policy(page: str, script: str) -> str:
    """The page with a script of the test's, which its policy would not let run."""
    bare = re.sub("<meta http-equiv.*?>", "", page, flags=re.DOTALL)
    return bare.replace("</body>", f"<script>{script}</script></body>")


CHECK = """
axe.run(document, {resultTypes: ["violations"]}).then(found => parent.postMessage({
  page: document.title, dark: matchMedia("(prefers-color-scheme: dark)").matches,
  passes: found.passes.length,
  violations: found.violations.map(v => [v.id, v.nodes.slice(0, 3).map(n => n.html)])}, "*"));
"""
COLLECT = """
<main><pre></pre></main><script>
const found = [];
addEventListener("message", event => {
  found.push(event.data);
  if (found.length === COUNT) document.querySelector("pre").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(not AXE.is_file(), reason="needs axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(pages: dict[str, Path], tmp_path: Path, scheme: str, width: int) -> None:
    """Contrast, headings, landmarks, names and whatever else it checks."""
    shutil.copy(AXE, tmp_path / "axe.js")
    frames = COLLECT.replace("COUNT", str(len(pages)))
    for name, file in pages.items():
        page = without_policy(file.read_text(), CHECK)
        page = page.replace("</head>", '<script src="axe.js"></script></head>')
        (tmp_path / f"{name}.html").write_text(page)
        frames += f'<iframe src="{name}.html" width="{width}" height="900"></iframe>'
    (tmp_path / "all.html").write_text(frames)
    color = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    size = "--window-size=1400,9000"
    dom = browse(tmp_path / "all.html", color, size, "--virtual-time-budget=60000")
    (said,) = re.findall("<pre>(.+?)</pre>", dom, re.DOTALL)
    found = json.loads(html.unescape(said))
    assert [one["page"] for one in found if one["violations"]] == [], found
    assert len(found) == len(pages) and all(one["passes"] > 10 for one in found)
    assert {one["dark"] for one in found} == {scheme == "dark"}


def test_the_policy_lets_in_the_pages_own_style_and_script_alone(pages: dict[str, Path]) -> None:
    for name, file in pages.items():
        page = file.read_text()
        (policy,) = re.findall('Content-Security-Policy" content="(.*?)"', page)
        wanted = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
        for kind in ("style", "script"):
            for text in re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL):
                digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                wanted += f"; {kind}-src 'sha256-{digest}'"
        assert policy == wanted, name
        assert not re.search(r"(?:src|href|url)\s*[=(]\s*\"?(?!data:|#)[^\"\s]", page), name
        assert " style=" not in page and " onclick" not in page


def test_the_browser_obeys_and_the_script_runs_under_the_policy(pages: dict[str, Path]) -> None:
    """The count of rows is the script's; a script that slipped in does nothing."""
    page = pages["masks"]
    rows = page.read_text().count('<tr><th scope="row" class="text">')
    assert rows == 3 * 12
    assert f"<output>{rows} of {rows} rows</output>" in browse(page)
    bad = page.parent / "bad.html"
    slipped = "<main><script>document.title = 'owned'</script>"
    bad.write_text(page.read_text().replace("<main>", slipped))
    assert "<title>owned</title>" not in browse(bad)
    bare = page.parent / "bare.html"
    bare.write_text(without_policy(page.read_text(), "document.title = 'owned'"))
    assert "<title>owned</title>" in browse(bare)


DRIVE = """{
const table = document.querySelector("table.sortable"), box = table.closest("section");
const column = at => [...table.tBodies[0].rows].filter(row => !row.hidden)
  .map(row => row.cells[at].textContent);
const head = at => table.tHead.rows[0].cells[at], said = {};
head(2).firstChild.click();
said.down = [column(2), head(2).getAttribute("aria-sort")];
head(2).firstChild.click();
said.up = [column(2), head(2).getAttribute("aria-sort")];
head(0).firstChild.click();
said.names = [column(0), head(0).getAttribute("aria-sort"), head(2).getAttribute("aria-sort")];
const only = box.querySelector("select"), find = box.querySelector("input");
only.value = "star";
only.dispatchEvent(new Event("change"));
said.only = [column(1), box.querySelector("output").textContent];
find.value = "SCENE-004";
find.dispatchEvent(new Event("input"));
said.found = [column(0), box.querySelector("output").textContent];
const cell = document.querySelector("button.cell");
cell.click();
const large = document.querySelector("dialog");
said.large = [large.open, large.querySelector("img").src === cell.firstChild.src,
  large.getAttribute("aria-label") === cell.firstChild.alt, document.activeElement.textContent];
large.querySelector("button").click();
said.closed = large.open;
document.title = JSON.stringify(said);
}"""


def test_the_table_sorts_and_filters_and_pictures_grow(
    pages: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "driven.html"
    file.write_text(without_policy(pages["masks"].read_text(), DRIVE))
    (title,) = re.findall("<title>(.*?)</title>", browse(file), re.DOTALL)
    said = json.loads(html.unescape(title))
    down, up = [float(v) for v in said["down"][0]], [float(v) for v in said["up"][0]]
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(set(up)) > 3
    assert (said["down"][1], said["up"][1]) == ("descending", "ascending")
    assert said["names"][0] == sorted(said["names"][0]) and said["names"][1:] == ["ascending", None]
    every = len(up)
    assert set(said["only"][0]) == {"star"}
    assert said["only"][1] == f"{len(said['only'][0])} of {every} rows"
    found = said["found"][0]
    assert found and all("scene-004" in name for name in found)
    assert said["found"][1] == f"{len(found)} of {every} rows"
    assert said["large"] == [True, True, True, "close"] and said["closed"] is False
