"""Prompts, captions and the report that shows them: text is taken as it is, or refused."""

import csv
import html.parser
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgen_jax.data.captions import CaptionedFile, read_captions
from qvgen_jax.evaluation.report import write_report
from qvgen_jax.evaluation.samples import slug
from qvgen_jax.request import prompt_list
from qvgen_jax.text.tokenizer import COGVIDEOX_PROMPTS, WAN_PROMPTS, load_tokenizer, tokenize
from tests.evaluation.full_workdir import layer, validation
from tests.evaluation.test_report import make_workdir
from tests.fuzz.campaign import drawn, generators, tried
from tests.fuzz.mutations import mutated_bytes, mutated_json

LENGTH = 16
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</figcaption></figure><iframe src=//x>",
    "&lt;script&gt;&#60;script&#62;&amp;amp;lt;b&amp;amp;gt;",
    "<!-- --><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "${title} $body {prompt} %s $$",
    "$(touch fuzz_ran_this) `touch fuzz_ran_this`; touch fuzz_ran_this",
    "../../etc/passwd\0.mp4",
    "\ud800\udfff",
    "\u202e\u2066 right to left \ufeff",
    "Z\u0351\u036b\u0343" * 200,
    "<extra_id_0></s><pad><unk>",
    "&" * 5000,
    "a" * 60_000,
    "a " * 50_001,
    "",
    " \t\r\n\v\f\x1c\x85\u2028",
)
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(codec=None), max_size=40),
    st.builds("".join, st.lists(st.sampled_from(HOSTILE[:14]), min_size=2, max_size=4)),
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("assets/tiny_wan/tokenizer")


@drawn(20)
@given(st.lists(texts, min_size=1, max_size=3), st.sampled_from((WAN_PROMPTS, COGVIDEOX_PROMPTS)))
def test_a_prompt_is_refused_or_becomes_tokens_of_its_own(tokenizer, prompts, rule):
    with tried("prompts"):
        ids, mask = tokenize(tokenizer, prompt_list(prompts), LENGTH, rule)
        assert ids.shape == mask.shape == (len(prompts), LENGTH)
        assert 0 <= ids.min() <= ids.max() < len(tokenizer)
        assert (mask[:, :-1] >= mask[:, 1:]).all()
        for row, prompt in zip(ids, prompts, strict=True):
            assert (tokenize(tokenizer, [prompt], LENGTH, rule)[0] == row).all()
            assert tokenizer.eos_token_id in row
            assert set(slug(prompt)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@drawn(20)
@given(st.lists(st.tuples(texts, texts), max_size=4), st.sampled_from(("jsonl", "csv")))
def test_captions_are_refused_or_read_as_they_were_written(tmp_path_factory, rows, kind):
    folder = tmp_path_factory.mktemp("captions")
    if kind == "jsonl":
        lines = [json.dumps({"file": file, "caption": text}) for file, text in rows]
        raw = "\n".join(lines).encode()
    else:
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows([("file", "caption"), *rows])
        raw = sink.getvalue().encode("utf-8", "surrogatepass")
    (folder / f"captions.{kind}").write_bytes(raw)
    with tried("captions"):
        found = read_captions(folder)
        assert found == [CaptionedFile(*(written(x, kind).strip() for x in row)) for row in rows]
        for file, _ in found:
            assert (folder / file).resolve().is_relative_to(folder.resolve())


def written(text: str, kind: str) -> str:
    """As the file says it: JSON joins halves of a character, text files have one end of line."""
    if kind == "jsonl":
        return json.loads(json.dumps(text))
    return text.replace("\r\n", "\n").replace("\r", "\n")


GOOD = {
    "captions.jsonl": b'{"file": "a.mp4", "caption": "a cat"}\n{"file": "b.mp4", "caption": "x"}\n',
    "captions.csv": b'file,caption\na.mp4,"a, cat"\nb.mp4,"two\nlines"\n',
    "videos.txt": b"a.mp4\nb.mp4\n",
}


def test_a_mutated_captions_file_is_refused_or_names_files_inside_its_folder(tmp_path):
    for label, rng in generators("captions files", 100):
        name = rng.choice(list(GOOD))
        folder = tmp_path / label.rpartition(" ")[2]
        folder.mkdir()
        (folder / "prompts.txt").write_text("a cat\nx\n")
        (folder / name).write_bytes(mutated_bytes(GOOD[name], rng))
        with tried("captions files"):
            for file, caption in read_captions(folder):
                assert (folder / file).resolve().is_relative_to(folder.resolve()), label
                caption.encode()


class Elements(html.parser.HTMLParser):
    """Every element with its attributes' names, and the values of those that can hold code."""

    def __init__(self, page: str):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        kept = [(k, v[:30] if k in ("src", "href", "style") else "") for k, v in attributes]
        self.found.append((tag, kept))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = make_workdir(tmp_path_factory.mktemp("run"))
    videos = {name: f"samples/{name}_000.mp4" for name in ("teacher", "student")}
    (workdir / "evaluation").mkdir()
    (workdir / "evaluation/videos.json").write_text(
        json.dumps([{"prompt": "a cat", "seed": 1, "videos": videos}])
    )
    few = {"layers": {f"blocks.{block}.ffn.up": layer(block, 0) for block in range(2)}}
    lines = [json.dumps(validation(step) | few) for step in (12, 24)]
    (workdir / "validation.jsonl").write_text("\n".join(lines))
    (workdir / "alarms.jsonl").write_text('{"step": 3, "alarm": "the loss is NaN"}\n')
    return workdir


@pytest.fixture(scope="module")
def plain_elements(workdir):
    return Elements(write_report(workdir).read_text()).found


@drawn(2)
@given(texts, texts, texts)
def test_a_report_has_the_same_elements_whatever_prompts_and_captions_say(
    workdir, plain_elements, prompt, name, device
):
    keep = {p: p.read_text() for p in workdir.rglob("*.json")}
    pair = json.loads((workdir / "samples/samples.json").read_text())
    pair[0]["prompt"] = prompt
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    evaluation |= {
        "prompts": prompt,
        "device": device,
        "timing": f"x{name}",
        "versions": {name: device},
    }
    config = json.loads((workdir / "config.json").read_text()) | {"command": f"x{prompt}"}
    (workdir / "samples/samples.json").write_text(json.dumps(pair))
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    (workdir / "config.json").write_text(json.dumps(config | {"name": f"x{name}"}))
    try:
        with tried("reports"):
            page = write_report(workdir).read_text()
            found = Elements(page).found
            assert found == plain_elements, [x for x in found if x not in plain_elements]
    finally:
        for path, text in keep.items():
            path.write_text(text)


def test_a_report_of_mutated_files_is_refused_or_shows_nothing_outside_the_workdir(workdir):
    names = ("samples/samples.json", "evaluation/videos.json", "evaluation.json", "sizes.json")
    logs = ("metrics.jsonl", "validation.jsonl", "alarms.jsonl")
    files = [workdir / name for name in (*names, *logs)]
    (workdir.parent / "secret.mp4").write_bytes((workdir / "samples/teacher_000.mp4").read_bytes())
    for label, rng in generators("files of a report", 10):
        path = rng.choice(files)
        good = path.read_text()
        lines = good.splitlines() if path.suffix == ".jsonl" else [good]
        chosen = rng.randrange(len(lines))
        content = mutated_json(json.loads(lines[chosen]), rng)
        if path in files[:2] and rng.random() < 0.3:
            content = json.loads(good)
            hostile = rng.choice(("../../secret.mp4", "../secret.mp4", str(Path("/etc/hostname"))))
            content[0].get("videos", content[0])["student"] = hostile
        lines[chosen] = json.dumps(content)
        path.write_text("\n".join(lines))
        try:
            with tried("files of a report"):
                page = write_report(workdir).read_text()
                assert "secret" not in page, label
                assert not [*(workdir / "report").rglob("secret*")], label
        finally:
            path.write_text(good)
