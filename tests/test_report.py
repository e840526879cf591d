"""Reports: Table A1's cells; means over seeds, missing rows, provenance; the HTML page."""

import base64
import io
import json
import os
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from etils import epath

from condiff_jax import page, report, results
from condiff_jax.objectives.validate import create_config

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "configs" / "tableA1.py"))
RECORDED = (ROOT / "docs" / "tableA1.md").read_text()
SWEPT = '''
"""Table X: padding <of> text & more."""
PAPER = {
    "padding=zero": {"FID": 3.0, "CLIP": None},
    "padding=a<b": {"FID": float("nan"), "CLIP": 26.6},
    "padding=noisy": {"FID": 2.75},
}
ROWS = tuple(PAPER)
NOTES = ("beta is 'small' & more",)
CITED = {"another [1]": {"FID": 4.5}}
'''
PNG = b"\x89PNG\r\n\x1a\n picture"


def recorded(row):
    """The cells of a row in docs/tableA1.md: for each value the paper's, ours, difference."""
    name = row.replace("arch=", "").replace("data=", "").replace("resolution=", "")
    line = next(line for line in RECORDED.splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    return [cells[:3], cells[3:]]


# To trace a UNet takes seconds: by default one of its rows.
SLOW = [row for row in TABLE["ROWS"] if "unet" in row and "imagenet1k,resolution=256" not in row]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow) if row in SLOW else row for row in TABLE["ROWS"]],
)
def test_cells_are_as_recorded_and_sizes_the_papers(row):
    ours = report.size_and_flop(create_config(TABLE["get_config"](row)))
    paper = list(TABLE["PAPER"][row].values())
    for value, (_, cell, _) in zip(ours, recorded(row), strict=True):
        assert f"{value:.2f}" == cell
    if "dit_att" not in row:  # the paper does not say how it is built, see NOTES
        assert ours[0] == pytest.approx(paper[0], rel=0.01)
    if "imagenet1k" in row and "unet" not in row and "dit_att" not in row:
        assert ours[1] == pytest.approx(paper[1], rel=0.01)


@pytest.mark.parametrize("row, paper", TABLE["PAPER"].items())
def test_every_large_difference_has_a_note(row, paper):
    for value, (theirs, ours, difference) in zip(paper.values(), recorded(row), strict=True):
        change = float(ours) / value - 1
        assert float(theirs) == value
        assert float(difference.rstrip("%")) == pytest.approx(100 * change, abs=0.06)
        arch = row.split(",")[0].removeprefix("arch=")
        assert abs(change) < 0.01 or any(note.startswith(arch) for note in TABLE["NOTES"])
    assert all(note in RECORDED for note in TABLE["NOTES"])


def test_a_computed_table_shows_paper_ours_and_difference(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(report.COMPUTED, "tableA1", lambda config: (800.0, 300.0))
    assert report.main([str(ROOT / "configs/tableA1.py"), "--format=markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| mmdit,cc12m,256 | 791.64 | 800.00 | +1.1% | 397.06 | 300.00 | -24.4% |" in shown
    heads = lambda text: next(line for line in text.splitlines() if "row |" in line)  # noqa: E731
    assert heads(shown) == heads(RECORDED)
    assert all(f"- {note}\n" in shown for note in TABLE["NOTES"])
    assert report.main([str(ROOT / "configs/tableA1.py"), "--format=html"]) == 0
    tree = Tree(capsys.readouterr().out)
    assert "mmdit,cc12m,512" in "".join(tree.words) and tree.tags.count("tr") == 22


def record(row, seed, **changes):
    made = {
        "table": "tableX", "row": row, "seed": seed, "scale": "small", "steps": 100,
        "status": "done", "folder": f"ours-S2-16px-seed{seed}-0a1b2c3{seed}-100", "overrides": {},
        "metrics": {"accuracy": 0.5 + 0.2 * seed, "shift": 4.0}, "sampling": {"guidance": 1.5},
        "evaluation": {"samples": 64}, "features": None,
        "pictures": {"sizes": "samples/1-sizes.png", "grid": "samples/1-grid.png"},
        "seconds": {"training": 10.0, "evaluation": 1.0}, "device": "TPU v5e", "devices": 1,
        "versions": {"jax": "1"}, "commit": "0123456789abcdef-dirty",
    }  # fmt: skip
    made |= changes
    if made["status"] != "done":
        for name in ("metrics", "sampling", "evaluation", "features", "pictures", "seconds"):
            del made[name]
    return made


@pytest.fixture
def swept(tmp_path):
    """(config file, work directory) of a table with results: two seeds, a diverged one, none."""
    config, workdir = tmp_path / "configs" / "tableX.py", tmp_path / "runs"
    config.parent.mkdir()
    config.write_text(SWEPT)
    bad = record("padding=a<b", 1, status="diverged", reason="step 3: <loss> nan")
    save(workdir, [record("padding=zero", 1), record("padding=zero", 0)], "results-0.jsonl")
    save(workdir, [record("padding=a<b", 0), bad], "results-1.jsonl")
    samples = workdir / record("padding=zero", 0)["folder"] / "samples"
    samples.mkdir(parents=True)
    (samples / "1-sizes.png").write_bytes(PNG)
    return str(config), str(workdir)


def save(folder, records, name="results.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in records))


def shown(capsys, *arguments):
    assert report.main([str(one) for one in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def cells(text, row):
    """The cells of a row in the Markdown form."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_rows_show_the_paper_means_over_seeds_and_provenance(swept, capsys):
    text = shown(capsys, swept[0], "--results", swept[1], "--format=markdown")
    head = cells(text, "row")
    assert head[1:5] == ["paper: FID", "paper: CLIP", "ours: accuracy", "ours: shift"]
    assert head[5:] == [
        f"provenance: {name}" for name in ("seeds", "scale", "steps", "run", "device", "commit")
    ]
    here = ["small", "100", "0a1b2c30, 0a1b2c31", "TPU v5e", "0123456+"]
    zero = cells(text, "padding=zero")
    assert zero == ["padding=zero", "3", "-", "0.6 ± 0.1", "4 ± 0", "0, 1", *here]
    # A diverged seed counts as such, and not in the mean; a cross of the paper's is one, too.
    other = cells(text, "padding=a<b")
    assert other[1:6] == ["diverged", "26.6", "0.5", "4", "0, 1 diverged"]
    assert cells(text, "padding=noisy") == ["padding=noisy", "2.75", *9 * "-"]
    for note in (
        "The paper's numbers and ours are not comparable",
        "smaller models on embedded data",
        "mean over seeds ± half of their range",
        "padding=a<b, seed 1 diverged: step 3: <loss> nan",
        "beta is 'small' & more",
        "Cited by the paper, another [1]: FID 4.5",
    ):
        assert note in text


def test_the_same_measures_at_the_papers_scale_are_compared(swept, tmp_path, capsys):
    one = record("padding=zero", 0, scale="paper", metrics={"FID": 3.1})
    save(tmp_path / "other", [one])
    text = shown(capsys, swept[0], "--results", tmp_path / "other", "--format=markdown")
    assert "not comparable" not in text
    assert cells(text, "row")[3] == "ours: FID" and cells(text, "padding=zero")[3] == "3.1"


def test_a_measure_that_the_paper_lacks_is_not_comparable_at_its_scale(swept, tmp_path, capsys):
    metrics = {"FID": 3.1, "accuracy": 0.5}
    save(tmp_path / "other", [record("padding=zero", 0, scale="paper", metrics=metrics)])
    text = shown(capsys, swept[0], "--results", tmp_path / "other", "--format=markdown")
    assert "not comparable: ours are other measures. Compare" in text


def test_parts_of_a_measure_have_no_column(swept, tmp_path, capsys):
    metrics = {"accuracy": 0.5, "sharpness_12": 3.0, "sharpness_response": 0.25}
    save(tmp_path / "other", [record("padding=zero", 0, metrics=metrics)])
    options = ["--results", tmp_path / "other"]
    head = cells(shown(capsys, swept[0], *options, "--format=markdown"), "row")
    assert head[3:6] == ["ours: accuracy", "ours: sharpness_response", "provenance: seeds"]
    page_text = shown(capsys, swept[0], *options, "--format=html")
    labels = [ElementTree.fromstring(part).get("aria-label") for part in svgs(page_text)]
    assert labels == ["accuracy", "sharpness_response"]


def test_a_cell_with_a_bar_does_not_add_a_column(swept, tmp_path, capsys):
    save(tmp_path / "other", [record("padding=zero", 0, device="a|b", metrics={"x|y": 1.0})])
    text = shown(capsys, swept[0], "--results", tmp_path / "other", "--format=markdown")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns == {11} and len(lines) == 5
    assert r"a\|b" in text and r"ours: x\|y" in text


def test_other_scales_steps_and_overrides_are_lines_of_their_own(swept, tmp_path, capsys):
    changed = record("padding=zero", 0, overrides={"batch_size": 4}, metrics={"accuracy": 0.25})
    save(tmp_path / "a", [changed])
    save(tmp_path / "b", [record("padding=zero", 0, scale="tiny", metrics={"accuracy": 0.125})])
    text = shown(
        capsys, swept[0], "--format=markdown",
        "--results", swept[1], tmp_path / "a", "--results", tmp_path / "b" / "results.jsonl",
    )  # fmt: skip
    assert cells(text, "padding=zero [batch_size=4]")[3:6] == ["0.25", "-", "0"]
    lines = [line for line in text.splitlines() if line.startswith("| padding=zero |")]
    assert [line.split(" | ")[3] for line in lines] == ["0.6 ± 0.1", "0.125"]


def test_overrides_of_all_lines_are_a_note(swept, tmp_path, capsys):
    both = {"batch_size": 4, "data.crop": [0.4, 1.0]}
    one = record("padding=zero", 0, overrides=both)
    save(tmp_path / "a", [one, record("padding=noisy", 0, overrides=both | {"steps": 9})])
    text = shown(capsys, swept[0], "--format=markdown", "--results", tmp_path / "a")
    assert "All of ours with batch_size=4, data.crop=[0.4, 1.0].\n" in text
    assert cells(text, "padding=zero")[5] == "0"
    assert cells(text, "padding=noisy [steps=9]")[5] == "0"


def test_text_columns_are_aligned(swept, capsys):
    text = shown(capsys, swept[0], f"--results={swept[1]}")
    title, _, groups, names, rule, *rows = text.splitlines()
    assert title == "Table X: padding <of> text & more."
    ends = [i for i, mark in enumerate(rule) if mark == "-" and rule[i + 1 : i + 2] in ("", " ")]
    assert len(ends) == 11
    for line in (names, *rows[:3]):
        assert all(line[end : end + 1] not in ("", " ") for end in ends[1:]), line
    for group, first in (("paper", "FID"), ("ours", "accuracy"), ("provenance", "seeds")):
        start = max(end + 3 for end in (-3, *ends) if end < names.index(first))
        assert groups.index(group) == start


def test_without_results_the_paper_stands_alone(swept, capsys):
    text = shown(capsys, swept[0])
    assert "No results of ours yet" in text and "ours" not in text.splitlines()[2]
    assert "<svg" not in shown(capsys, swept[0], "--format=html")


def test_save_records_what_is_used_for_others_to_report(swept, tmp_path, capsys):
    saved = tmp_path / "benchmarks" / "results" / "tableX.json"
    more = record("padding=noisy", 0, overrides={"init.path": "/home/me/old"})
    save(tmp_path / "runs", [more, record("padding=gone", 0), record("a", 0, table="tableY")])
    options = ["--results", swept[1], "--format=markdown"]
    text = shown(capsys, swept[0], *options, f"--save={saved}")
    kept = json.loads(saved.read_text())
    assert [(one["row"], one["seed"]) for one in kept] == [
        ("padding=a<b", 0), ("padding=a<b", 1), ("padding=noisy", 0),
        ("padding=zero", 0), ("padding=zero", 1),
    ]  # fmt: skip
    assert kept[2]["overrides"] == {"init.path": "old"}
    assert str(tmp_path) not in saved.read_text() and "/home" not in saved.read_text()
    assert {"sampling", "evaluation", "versions", "commit", "seconds"} <= set(kept[0])
    # The recorded results are what a report without --results shows.
    again = shown(capsys, swept[0], "--format=markdown")
    assert again == text.replace("/home/me/old", "old")


def test_of_two_results_the_later_counts_but_no_failure_undoes_a_result(tmp_path):
    failed = record("padding=zero", 0, status="failed", reason="disk")
    done = record("padding=zero", 0)
    for order, status in (([failed, done], "done"), ([done, failed], "done"), ([failed], "failed")):
        save(tmp_path / "one", order)
        (found,) = results.read([tmp_path / "one"])
        assert found["status"] == status
    save(tmp_path / "one", [done, done | {"metrics": {"accuracy": 1.0}}])
    assert results.read([tmp_path / "one"])[0]["metrics"] == {"accuracy": 1.0}


class Tree(HTMLParser):
    """Checks that every tag is closed in order, and collects text, tags and attributes."""

    VOID = {"meta", "img", "wbr", "rect", "line", "circle", "polyline"}

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def html(swept, tmp_path, capsys):
    out = tmp_path / "site" / "tableX.html"
    assert shown(capsys, swept[0], "--results", swept[1], f"--out={out}") == ""
    return out.read_text()


def test_page_is_well_formed_and_has_every_row_and_note(html):
    tree = Tree(html)
    text = "".join(tree.words)
    for part in ("padding=zero", "padding=a<b", "padding=noisy", "0.6 ± 0.1", "<loss>"):
        assert part in text
    assert "Table X: padding <of> text & more." in text and "beta is 'small' & more" in text
    assert "b>" not in tree.tags and "of" not in tree.tags and "loss" not in tree.tags
    assert ("name", "viewport") in tree.attributes
    assert "0123456789abcdef-dirty" in text  # folded provenance has everything


def test_page_embeds_pictures_and_refers_to_nothing_outside(html):
    tree = Tree(html)
    sources = [value for name, value in tree.attributes if name == "src"]
    # Both rows' first seeds have the same run's folder in the fixture; there is no grid.png.
    data = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert sources == [data, data]
    assert "Same noise, different size control" in html and "<h2>Samples" not in html
    assert not {"script", "link", "iframe", "object"} & set(tree.tags)
    assert not {"href", "srcset", "action"} & {name for name, _ in tree.attributes}
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_page_plots_each_metric_with_a_dot_for_each_seed(html):
    drawings = [ElementTree.fromstring(part) for part in svgs(html)]
    assert [drawing.get("aria-label") for drawing in drawings] == ["accuracy", "shift"]
    bars, dots = (drawings[0].findall(tag) for tag in ("rect", "circle"))
    assert len(bars) == 2 and len(dots) == 3
    length = [float(bar.get("width")) for bar in bars]
    assert length[0] / length[1] == pytest.approx(0.6 / 0.5, rel=0.01)  # from zero
    texts = [text.text for text in drawings[0].findall("text")]
    assert texts == ["padding=zero", "0.6", "padding=a<b", "0.5"]


def svgs(html):
    return ["<svg" + part.split("</svg>")[0] + "</svg>" for part in html.split("<svg")[1:]]


def line(row, *values):
    return results.Line(row, [record(row, i, metrics={"m": v}) for i, v in enumerate(values)])


def test_numbers_make_curves_one_for_each_choice_of_the_others():
    lines = [
        line(f"size={size},guidance={guidance}", guidance * size, guidance * size + 1)
        for size in (1, 2)
        for guidance in (1.0, 3.0, 2.0)
    ]
    lines.append(line("beta=1", 7.0))
    content = page.plots(lines)
    Tree(content)
    drawing, other = map(ElementTree.fromstring, svgs(content))
    assert drawing.get("aria-label") == "m over guidance" and other.get("aria-label") == "m"
    assert len(drawing.findall("circle")) == 12
    paths = [
        [tuple(map(float, point.split(","))) for point in path.get("points").split()]
        for path in drawing.findall("polyline")
    ]
    assert len(paths) == 2
    for path, size in zip(paths, (1, 2), strict=True):
        x, y = zip(*path, strict=True)
        assert list(x) == sorted(x)
        assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)  # in order: 1, 2, 3
        slope = (y[0] - y[2]) / (paths[0][0][1] - paths[0][2][1])
        assert slope == pytest.approx(size, rel=0.01)  # larger values are higher up
    ticks = [text.text for text in drawing.findall("text")]
    assert {"1", "2", "3", "guidance"} <= set(ticks)
    assert "size=1</li>" in content and "size=2</li>" in content


def test_overrides_make_curves_of_their_own():
    lines = [
        results.Line(f"guidance={guidance}", line("", value).records, changed)
        for value, changed in ((1.0, ("batch_size=4",)), (2.0, ("batch_size=8",)))
        for guidance in (1.0, 2.0, 3.0)
    ]
    content = page.plots(lines)
    (drawing,) = map(ElementTree.fromstring, svgs(content))
    paths = [path.get("points").split() for path in drawing.findall("polyline")]
    assert [len(path) for path in paths] == [3, 3]
    assert "[batch_size=4]</li>" in content and "[batch_size=8]</li>" in content


def test_bars_of_negative_values_go_left_from_zero():
    lines = [line("padding=a", -2.0), line("padding=b", 1.0, 3.0), line("padding=c", -1.0, 0.0)]
    (drawing,) = map(ElementTree.fromstring, svgs(page.plots(lines)))
    bars = [(float(bar.get("x")), float(bar.get("width"))) for bar in drawing.findall("rect")]
    (low, down), (zero, up), (half, less) = bars
    assert low >= 0 and down > 0 and low + down == pytest.approx(zero, abs=0.11)
    assert up == pytest.approx(down, abs=0.11)  # the mean of 1 and 3
    assert half + less == pytest.approx(zero, abs=0.11) and less == pytest.approx(down / 4, abs=0.1)
    dots = [float(dot.get("cx")) for dot in drawing.findall("circle")]
    assert dots[0] == pytest.approx(low, abs=0.11) and dots[-1] == pytest.approx(zero, abs=0.11)
    assert min(dots) >= 0


def test_a_row_shows_the_picture_of_one_seed(tmp_path):
    lines = []
    for row, seeds in (("padding=zero", (0, 1)), ("padding=noisy", (1,))):
        found = [record(row, seed, root=str(tmp_path)) for seed in seeds]
        lines.append(results.Line(row, found))
        for one in found:
            samples = tmp_path / one["folder"] / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            (samples / "1-grid.png").write_bytes(PNG + str(one["seed"]).encode())
    content = page.pictures(lines)
    Tree(content)
    assert re.findall(r"<figcaption>([^<]*)<", content) == [
        "padding=zero, seed 0", "padding=noisy, seed 1",
    ]  # fmt: skip
    assert content.count("<img") == 2
    assert base64.b64encode(PNG + b"0").decode() in content


def test_nothing_that_is_named_becomes_markup(tmp_path):
    """Tags in names of metrics, rows, devices and pictures are text."""
    places = ("title", "group", "row", "cell", "note", "metric", "axis", "legend")
    places += ("override", "device", "kind")
    tags = {place: f"<u-{place}>" for place in places}
    lines = []
    for legend in ("x", tags["legend"]):
        for value in (1, 2, 3):
            row = f"{tags['axis']}={value},part={legend}"
            one = record(
                row, 0, metrics={tags["metric"]: value}, device=tags["device"], root=str(tmp_path),
                pictures={tags["kind"]: "a.png"}, folder=".",
            )  # fmt: skip
            lines.append(results.Line(row, [one], (tags["override"],)))
    bar = record(tags["row"], 0, metrics={tags["metric"]: 1.0}, pictures={})
    lines.append(results.Line(tags["row"], [bar]))
    (tmp_path / "a.png").write_bytes(PNG)
    table = results.Table(
        tags["title"],
        [("", "row"), (tags["group"], tags["metric"])],
        [[tags["row"], tags["cell"]]],
        [tags["note"]],
    )
    content = page.html(table, lines)
    tree = Tree(content)
    assert not [tag for tag in tree.tags if tag.startswith("u-")]
    assert all(tag in "".join(tree.words) for tag in tags.values())
    labels = {value for name, value in tree.attributes if name == "aria-label"}
    assert labels == {f"{tags['metric']} over {tags['axis']}", tags["metric"]}
    named = results.Line("a", [record("a", 0, metrics={'m" id="m': 1.0})])
    (drawing,) = map(ElementTree.fromstring, svgs(page.plots([named])))
    assert drawing.get("aria-label") == 'm" id="m' and not drawing.get("id")


def test_an_axis_over_decades_is_logarithmic():
    place, ticks = page._axis([1e-4, 1e-2], 0.0, 100.0, logarithmic=True)
    assert place(1e-3) == pytest.approx(50) and ticks == pytest.approx([1e-4, 1e-3, 1e-2])
    place, ticks = page._axis([1.0, 1.5, 2.0], 0.0, 100.0, logarithmic=True)
    assert place(1.5) == 50 and ticks == pytest.approx([1, 1.2, 1.4, 1.6, 1.8, 2])
    place, ticks = page._axis([3.0], 0.0, 100.0)
    assert place(3.0) == 0 and ticks == [3.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "table"),
        (["configs/quickstart.py"], "no ROWS"),
        (["tableA1"], "not a config file"),
        (["configs/none.py"], "No such file"),
        (["configs/tableA1.py", "--results", "runs"], "is computed"),
        (["configs/table3.py", "--results", "/no/such"], "no such file or folder"),
        (["configs/table3.py", "--format=pdf"], "invalid choice"),
        (["configs/table3.py", "--out=README.md/x.html"], "README.md/x.html: "),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert report.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


SECRETS = {  # how results name a file of this machine, which is no picture of theirs
    "../outside/secret.png": lambda samples, outside: None,
    "OUTSIDE/secret.png": lambda samples, outside: None,
    "samples/text.txt": lambda samples, outside: (samples / "text.txt").write_bytes(PNG + SECRET),
    "samples/text.png": lambda samples, outside: (samples / "text.png").write_bytes(SECRET),
    "samples/link.png": lambda samples, outside: (samples / "link.png").symlink_to(
        outside / "secret.png"
    ),
    "samples/folder/secret.png": lambda samples, outside: (samples / "folder").symlink_to(outside),
    "samples/pipe.png": lambda samples, outside: os.mkfifo(samples / "pipe.png"),
}
SECRET = b"secret"


@pytest.mark.parametrize("place", SECRETS)
@pytest.mark.parametrize("of_run", [False, True])
def test_a_page_shows_no_file_but_pictures_of_the_run(swept, tmp_path, capsys, place, of_run):
    """Results may come from others; a page is for sending on."""
    outside, folder = tmp_path / "outside", "" if of_run else "ours-0a1b2c30-100"
    outside.mkdir()
    (outside / "secret.png").write_bytes(PNG + SECRET)
    (tmp_path / "real" / folder / "samples").mkdir(parents=True)
    (tmp_path / "results").symlink_to(tmp_path / "real")  # a folder that is a link is one's own
    samples = tmp_path / "results" / folder / "samples"
    (samples / "1.png").write_bytes(PNG)
    (samples / "2.png").symlink_to("1.png")
    SECRETS[place](samples, outside)
    pictures = {"sizes": "samples/1.png", "flip": "samples/2.png"}
    pictures |= {"grid": place.replace("OUTSIDE", str(outside))}
    one = record("padding=zero", 0, folder=folder, pictures=pictures)
    one["sampling"]["seed"], one["step"] = 0, 1
    name = "evaluation" if of_run else "results"
    save(tmp_path / "results", [one], f"{name}.jsonl")
    results_of = [tmp_path / "results"]
    arguments = results_of if of_run else [swept[0], "--results", *results_of]
    content = shown(capsys, *arguments, "--format=html")
    embedded = re.findall('base64,([^"]*)', content)
    assert list(map(base64.b64decode, embedded)) == [PNG, PNG]


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
@pytest.mark.parametrize("name", ["evaluation.jsonl", "results-0.jsonl"])
def test_results_are_regular_files_of_their_folder(swept, tmp_path, capsys, name, plant):
    results_of = tmp_path / "results"
    results_of.mkdir()
    plant(results_of / name)
    run = [results_of] if name.startswith("evaluation") else [swept[0], "--results", results_of]
    assert report.main(list(map(str, run))) == 2
    err = capsys.readouterr().err
    assert err == f"error: {results_of / name}: not a regular file of its folder; copy it there\n"


def test_a_page_shows_pictures_of_buckets():
    found = {"root": "gs://b/runs", "folder": "a", "pictures": {"grid": "samples/1.png"}}
    files = {"gs://b/runs/a/samples/1.png": PNG}
    bucket = epath.testing.mock_epath(
        exists=lambda _, path: path in files, open=lambda _, path, mode: io.BytesIO(files[path])
    )
    with bucket:
        assert base64.b64decode(page.picture(found, "grid")) == PNG
        assert not page.picture(found | {"folder": "b"}, "grid")
