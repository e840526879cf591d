"""The HTML page of a report: text, figures, images, escaping, and files that it must not show."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from etils import epath

from condiff_jax.studies import html_report
from condiff_jax.studies.results import ResultRow, Table
from tests.studies import commands
from tests.studies.records import PNG, record, save

SVG = "{http://www.w3.org/2000/svg}"


class Tree(HTMLParser):
    """A parser that checks that tags are closed in order, and collects text, tags, attributes."""

    VOID = {"meta", "img"}

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

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

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture
def html(swept, shown):
    return shown(*swept, kind="html")


def row(text, *values, changed=()):
    records = [record(text, seed, metrics={"m": value}) for seed, value in enumerate(values)]
    return ResultRow(text, records, changed)


def drawn(rows):
    """{label: texts} of the figures of rows; checks that each is well-formed."""
    trees = [ElementTree.fromstring(svg) for _, svg in html_report.figures(rows)]
    assert all(tree.tag == f"{SVG}svg" and tree.get("viewBox") for tree in trees)
    return {tree.get("aria-label"): [e.text for e in tree.iter(f"{SVG}text")] for tree in trees}


def page(rows, table=None):
    return html_report.render(table or Table("t", [("", "row")], [["a"]], []), rows)


def test_page_has_every_row_and_note_as_text(html):
    tree = Tree(html)
    text = "".join(tree.words)
    for part in ("padding=zero", "padding=a<b", "padding=noisy", "0.6 ± 0.1", "<loss>"):
        assert part in text
    assert "Table X: padding <of> text & more." in text and "beta is 'small' & more" in text
    assert not {"b", "of", "loss"} & set(tree.tags)
    assert ("name", "viewport") in tree.attributes
    assert "0123456789abcdef-dirty" in text  # folded provenance has everything


def test_page_embeds_images_and_has_no_remote_references(html):
    tree = Tree(html)
    # Both rows' first seeds have the same run's folder in the fixture; there is no grid.png.
    data = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert tree.values("src") == [data, data]
    assert "Same noise, different size control" in html and "<h2>Samples" not in html
    assert not {"script", "link", "iframe", "object", "image", "foreignobject"} & set(tree.tags)
    assert not {"href", "srcset", "action"} & {name for name, _ in tree.attributes}
    assert all(value.startswith("#") for value in tree.values("xlink:href"))
    assert not [name for name, _ in tree.attributes if name.startswith("on")]
    assert "@import" not in html and all("url(#" in part for part in re.findall(r"url\(.", html))
    outside = {value for value in re.findall("https?:[^\"']*", html)}
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # namespaces


def test_page_is_the_same_each_time_and_has_no_id_twice(swept, shown):
    first, second = (shown(*swept, kind="html") for _ in range(2))
    assert first == second
    for _, svg in html_report.figures([row("a=1", 1.0), row("a=2", 2.0), row("a=3", 3.0)]):
        ids = Tree(svg).values("id")
        assert len(ids) == len(set(ids)) and not [name for name in ids if "figure" in name]


def test_bars_show_rows_and_means(html):
    labels = [name for name in Tree(html).values("aria-label")]
    assert labels == ["accuracy", "shift"]
    texts = drawn([row("padding=zero", 0.5, 0.7), row("padding=noisy", 0.25)])
    assert texts == {"m": ["padding=zero", "0.6", "padding=noisy", "0.25"]}


def test_bars_go_from_zero_to_the_mean_with_a_dot_for_each_seed():
    rows = [row("padding=a", -2.0), row("padding=b", 1.0, 3.0), row("padding=c", -1.0, 0.0)]
    axes = html_report.bars(rows, "m").axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, -2), (0, 2), (0, -0.5)]
    dots = [tuple(line.get_xdata()) for line in axes.lines[1:]]
    assert dots == [(-2.0,), (1.0, 3.0), (-1.0, 0.0)]
    low, high = axes.get_xlim()
    assert low <= -2 and high >= 3


def test_a_single_row_has_no_bars_and_values_that_are_not_finite_are_left_out():
    assert drawn([row("padding=a", 1.0)]) == {}
    rows = [
        row("padding=a", 1.0, float("nan")),
        row("padding=b", float("inf")),
        row("padding=c", 2),
    ]
    assert drawn(rows) == {"m": ["padding=a", "1", "padding=c", "2"]}


def test_numeric_arguments_make_a_curve_for_each_choice_of_the_others():
    rows = [
        row(f"part=x,size={size},guidance={guidance}", guidance * size, guidance * size + 1)
        for size in (1, 2)
        for guidance in (1.0, 3.0, 2.0)
    ]
    texts = drawn([*rows, row("beta=1", 7.0), row("beta=2", 7.0)])
    assert list(texts) == ["m over guidance", "m"]
    assert {"1", "2", "3", "guidance", "size=1", "size=2"} <= set(texts["m over guidance"])
    assert "part=x" not in "".join(texts["m over guidance"])  # equal in all curves
    axes = html_report.curves(rows, "m", "guidance").axes[0]
    means, seeds = axes.lines[::2], axes.lines[1::2]
    assert [list(line.get_xdata()) for line in means] == [[1, 2, 3]] * 2
    assert [list(line.get_ydata()) for line in means] == [[1.5, 2.5, 3.5], [2.5, 4.5, 6.5]]
    assert [len(line.get_xdata()) for line in seeds] == [6, 6]
    assert len({line.get_color() for line in means}) == len({s.get_marker() for s in seeds}) == 2
    assert axes.get_xscale() == "linear"


def test_overrides_make_separate_curves():
    rows = [
        row(f"guidance={guidance}", value, changed=changed)
        for value, changed in ((1.0, ("batch_size=4",)), (2.0, ("batch_size=8",)))
        for guidance in (1.0, 2.0, 3.0)
    ]
    (texts,) = drawn(rows).values()
    assert {"batch_size=4", "batch_size=8"} <= set(texts)


def test_an_axis_over_decades_is_logarithmic():
    rows = [row(f"rate={rate}", 1.0) for rate in ("1e-4", "1e-3", "1e-2")]
    axes = html_report.curves(rows, "m", "rate").axes[0]
    assert axes.get_xscale() == "log"
    assert {"0.0001", "0.001", "0.01"} <= set(drawn(rows)["m over rate"])


@pytest.mark.parametrize("seed", range(20))
def test_labels_of_curves_stay_apart_in_their_order(seed):
    import numpy as np

    heights = np.sort(np.random.default_rng(seed).uniform(size=8) ** 3)
    apart = html_report.spread(heights, 0.1, 1.0)
    assert np.all(np.diff(apart) > 0.0999) and max(apart) <= 1
    assert html_report.spread([0.1, 0.5, 0.9], 0.1, 1.0) == [0.1, 0.5, 0.9]


def test_a_row_shows_the_image_of_one_seed(tmp_path):
    rows = []
    for text, seeds in (("padding=zero", (0, 1)), ("padding=noisy", (1,))):
        records = [record(text, seed, root=str(tmp_path)) for seed in seeds]
        rows.append(ResultRow(text, records))
        for result in records:
            samples = tmp_path / result["folder"] / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            (samples / "1-grid.png").write_bytes(PNG + str(result["seed"]).encode())
    content = page(rows)
    captions = re.findall(r"<figcaption>([^<]*)</figcaption><img", content)
    assert captions == ["padding=zero, seed 0", "padding=noisy, seed 1"]
    assert base64.b64encode(PNG + b"0").decode() in content


def test_names_are_escaped(tmp_path):
    """Tags and mathematics in names of metrics, rows, devices and images are shown as text."""
    places = ("title", "group", "row", "cell", "note", "metric", "axis", "legend")
    places += ("override", "device", "kind")
    tags = {place: f"<u-{place}>$_{{'&" for place in places}
    rows = []
    for legend in ("x", tags["legend"]):
        for value in (1, 2, 3):
            text = f"{tags['axis']}={value},part={legend}"
            result = record(
                text, 0, metrics={tags["metric"]: value}, device=tags["device"], folder=".",
                root=str(tmp_path), pictures={tags["kind"]: "a.png"},
            )  # fmt: skip
            rows.append(ResultRow(text, [result], (tags["override"],)))
    for seed in (0, 1):
        result = record(tags["row"], seed, metrics={tags["metric"]: 1.0}, pictures={})
        rows.append(ResultRow(tags["row"], [result]))
    (tmp_path / "a.png").write_bytes(PNG)
    columns = [("", "row"), (tags["group"], tags["metric"])]
    table = Table(tags["title"], columns, [[tags["row"], tags["cell"]]], [tags["note"]])
    tree = Tree(page(rows, table))
    assert not [tag for tag in tree.tags if tag.startswith("u-")]
    assert all(tag in "".join(tree.words) for tag in tags.values())
    labels = set(tree.values("aria-label"))
    assert labels == {f"{tags['metric']} over {tags['axis']}", tags["metric"]}


@pytest.mark.parametrize(
    "text", ["a\x00b", "a\x1b[31mb", "a\ud800b", "a\nb", 'm" id="m', "$\\frac"]
)
def test_any_characters_can_be_drawn(text, tmp_path):
    rows = [ResultRow(text, [record(text, 0, metrics={text: 1.0}, pictures={})])] * 2
    (label,) = drawn(rows)
    assert label.isprintable()
    assert text.isprintable() == (label == text)
    table = Table(text, [("", text)], [[text]], [text])
    assert Tree(page(rows, table)).tags.count("svg") == 1


SECRET = b"secret"
SECRETS = {  # paths in results to files that are not images of the run
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


@pytest.mark.parametrize("place", SECRETS)
@pytest.mark.parametrize("of_run", [False, True])
def test_a_page_shows_no_file_but_images_of_the_run(swept, tmp_path, shown, place, of_run):
    """Results may come from other people, and pages are shared."""
    outside, folder = tmp_path / "outside", "" if of_run else "ours-0a1b2c30-100"
    outside.mkdir()
    (outside / "secret.png").write_bytes(PNG + SECRET)
    (tmp_path / "real" / folder / "samples").mkdir(parents=True)
    (tmp_path / "results").symlink_to(tmp_path / "real")  # the work directory itself may be a link
    samples = tmp_path / "results" / folder / "samples"
    (samples / "1.png").write_bytes(PNG)
    (samples / "2.png").symlink_to("1.png")
    SECRETS[place](samples, outside)
    pictures = {"sizes": "samples/1.png", "flip": "samples/2.png"}
    pictures |= {"grid": place.replace("OUTSIDE", str(outside))}
    result = record("padding=zero", 0, folder=folder, pictures=pictures)
    result["sampling"]["seed"], result["step"] = 0, 1
    save(tmp_path / "results", [result], "evaluation.jsonl" if of_run else "results.jsonl")
    table = [] if of_run else [swept[0]]
    content = shown(*table, f"--workdir={tmp_path}/results", kind="html")
    embedded = re.findall('base64,([^"]*)', content)
    assert list(map(base64.b64decode, embedded)) == [PNG, PNG]


def test_a_page_shows_images_of_buckets():
    result = {"root": "gs://b/runs", "folder": "a", "pictures": {"grid": "samples/1.png"}}
    files = {"gs://b/runs/a/samples/1.png": PNG}
    bucket = epath.testing.mock_epath(
        exists=lambda _, path: path in files, open=lambda _, path, mode: io.BytesIO(files[path])
    )
    with bucket:
        assert base64.b64decode(html_report.image(result, "grid")) == PNG
        assert not html_report.image(result | {"folder": "b"}, "grid")


def test_a_page_that_cannot_be_written_is_one_line(swept, tmp_path, capsys):
    assert commands.report(*swept, f"--html={tmp_path}") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
