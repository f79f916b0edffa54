"""The report on a small made-up workdir: every number as measured, nothing from elsewhere."""

import json
import re
from itertools import pairwise

import av
import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.report import read_metrics, write_report
from qvgen_jax.evaluation.report.curves import column, phases
from qvgen_jax.evaluation.report.layers import group_layers, page_names
from qvgen_jax.evaluation.report.validation import lines_by_timestep
from qvgen_jax.evaluation.report.words import signed, significant
from tests.evaluation.full_workdir import add_everything, layer, validation


def write_mp4(path, size=32, frames=5):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            image = np.full((size, size, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def variant(name, strict, difference=None):
    share = {"count": strict, "total": 16, "interval": [strict / 16 - 0.2, strict / 16]}
    counts = {key: {"count": 15, "total": 16} for key in ("shape", "colour", "direction")}
    return {
        "name": name,
        "strict": share,
        "plain": share,
        **counts,
        "strict_difference": difference,
        "latent_difference": 0.2612 if difference else None,
        "seconds_per_video": 0.437,
    }


def records(steps=60):
    for step in range(steps):
        rank = [4, 2, 1, 0][min(step // 12, 3)]
        record = {"step": step, "loss": 1 / (step + 1), "grad_norm": 0.1 + step % 3, "rank": rank}
        record |= {"gate": 0.5, "lr_weights": 1e-4, "lr_branch": 1e-4, "lr_clips": 1e-2}
        yield record | ({"small_singular_share": 0.7} if rank else {})


def make_workdir(path):
    (path / "samples").mkdir()
    for name in ("teacher_000.mp4", "student_000.mp4"):
        write_mp4(path / "samples" / name)
    pair = {"prompt": "a red <b>star</b> & more", "seed": 7}
    pair |= {"teacher": "teacher_000.mp4", "student": "student_000.mp4"}
    evaluation = {
        "videos": 16,
        "prompts": "held out: never trained on",
        "seed": 1000,
        "timing": "Compilation is included.",
        "steps": 25,
        "guidance_scale": 2.5,
        "variants": [
            variant("Full precision", 15),
            variant("QVGen W4A4", 13, {"mean": -0.125, "interval": [-0.31, 0.06]}),
        ],
        "device": "cpu, 2 cores",
        "versions": {"jax": "0.10.2"},
    }
    sizes = {"transformer_bf16_bytes": 5_240_000, "transformer_export_bytes": 1_470_000}
    sizes |= {"linears_bf16_bytes": 4_800_000, "linears_export_bytes": 1_300_000}
    contents = {
        "config.json": {
            "name": "tiny_w4a4",
            "seed": 11,
            "quant": {"weight_bits": 4, "act_bits": 4},
            "command": "python main.py --x=<y>",
        },
        "samples/samples.json": [pair],
        "evaluation.json": evaluation,
        "sizes.json": sizes,
    }
    for name, content in contents.items():
        (path / name).write_text(json.dumps(content))
    lines = [json.dumps(record) for record in records()]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def workdir(tmp_path):
    return make_workdir(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read(make_workdir(tmp_path_factory.mktemp("run")))


def read(workdir):
    return write_report(workdir).read_text("utf-8")


def test_the_report_needs_nothing_outside_its_folder(workdir):
    path = write_report(workdir)
    page = path.read_text("utf-8")
    assert "http://" not in page
    assert "https://" not in page
    links = re.findall(r'(?:\bsrc|href|poster|data)="([^"]*)"', page)
    files = [link for link in links if not link.startswith(("data:", "#"))]
    assert files == [f"videos/samples/{name}_000.mp4" for name in ("teacher", "student")]
    for name in files:
        original = workdir / name.removeprefix("videos/")
        assert (path.parent / name).read_bytes() == original.read_bytes()
    assert page.count('<svg class="curve"') == 6


def test_what_an_earlier_report_showed_is_gone(workdir):
    folder = workdir / "report"
    (folder / "videos" / "evaluation").mkdir(parents=True)
    (folder / "layers-attn1.html").write_text("of a run that was")
    write_report(workdir)
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "videos"]
    assert [path.name for path in (folder / "videos").iterdir()] == ["samples"]


def test_ids_in_the_page_are_unique_and_those_used_exist(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', page)
    assert used
    assert set(used) <= set(ids)


def test_measured_numbers_appear(page):
    assert "Of 16 videos (prompts held out)" in page
    assert "demo-sized" in page
    for text in ("13/16", "15/16", "61–81 %", "−12.5", "−31.0 to +6.0", "0.26", "0.44 s"):
        assert text in page, text
    for text in (
        "W4A4",
        "5.24 MB",
        "1.47 MB",
        "0.28 of",
        "seed 11",
        "--x=&lt;y&gt;",
        "never trained on",
        "Compilation is included",
        "0.10.2",
        "not the speed claim",
    ):
        assert text in page, text


def test_a_large_evaluation_is_not_called_demo_sized(workdir):
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    (workdir / "evaluation.json").write_text(json.dumps(evaluation | {"videos": 512}))
    assert "demo-sized" not in read(workdir)


def test_prompts_are_escaped(page):
    assert "<b>star</b>" not in page
    assert "a red &lt;b&gt;star&lt;/b&gt; &amp; more" in page


def test_what_was_not_measured_is_said(workdir):
    for name in ("config.json", "samples/samples.json", "evaluation.json", "sizes.json"):
        (workdir / name).unlink()
    (workdir / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    page = read(workdir)
    for text in (
        "No samples were generated",
        "No videos were judged",
        "not validated while it trained",
        "No validation measured the layers",
        "No export was measured",
        "Generation was not timed",
        "Not logged in this run",
        "The seed was not recorded",
        "The command was not recorded",
        "config.json</code> is missing",
        "was not compared with full precision",
    ):
        assert text in page, text
    assert "<video" not in page


def test_a_lost_video_leaves_the_rest_of_the_report(workdir):
    (workdir / "samples" / "student_000.mp4").unlink()
    page = read(workdir)
    assert page.count("<video") == 1
    assert "student_000.mp4 is missing" in page


def test_a_link_out_of_the_workdir_is_not_followed(workdir, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.mp4"
    link = workdir / "samples" / "student_000.mp4"
    link.rename(secret)
    link.symlink_to(secret)
    assert "student_000.mp4 is missing" in read(workdir)
    assert not (workdir / "report/videos/samples/student_000.mp4").exists()
    link.unlink()
    secret.rename(workdir / "kept.mp4")
    link.symlink_to(workdir / "kept.mp4")
    assert read(workdir).count("<video") == 2, "a link inside is"


def test_what_an_earlier_report_linked_to_stays(workdir, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").write_text("kept")
    (workdir / "report").mkdir()
    (workdir / "report" / "videos").symlink_to(elsewhere)
    assert read(workdir).count("<video") == 2
    assert not (workdir / "report" / "videos").is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_what_cannot_be_removed_is_told(workdir):
    (workdir / "report").mkdir()
    (workdir / "report" / "videos").write_text("no folder")
    with pytest.raises(UserError, match=r"report/videos, of an earlier report, cannot be removed"):
        write_report(workdir)


def test_takes_of_a_validation_that_are_left_out_are_counted(workdir):
    line = validation(12) | {"layers": None}
    pair = line["videos"][0]
    line["videos"] = [pair | {"seed": seed} for seed in range(26)]
    (workdir / "validation.jsonl").write_text(json.dumps(line) + "\n")
    assert "The first 24 of 26 pairs of prompt and seed." in read(workdir)


def test_a_resumed_log_counts_each_step_once_and_skips_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 3}\n{"step": 1, "loss": 4}\n{"st')
    assert read_metrics(path) == [{"step": 1, "loss": 4}, {"step": 2, "loss": 3}]


def test_values_that_are_not_finite_leave_a_gap(workdir):
    (workdir / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.0, "grad_norm": 2.0}\n'
        '{"step": 1, "loss": NaN, "grad_norm": Infinity}\n'
    )
    assert "Loss" in read(workdir)


def test_ranks_and_rates_that_cannot_be_count_as_not_logged(workdir):
    lines = ['{"step": 0, "rank": 4, "lr_weights": 1e-4}', '{"step": 1, "rank": NaN}']
    lines += ['{"step": 2, "rank": -1, "lr_weights": NaN}', '{"step": 3, "lr_weights": -Infinity}']
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    logged = read_metrics(workdir / "metrics.jsonl")
    assert logged[1:] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert "<small>rank 4</small>" in read(workdir)


def test_an_empty_transformer_has_a_share_of_nothing(workdir):
    sizes = json.loads((workdir / "sizes.json").read_text()) | {"transformer_bf16_bytes": 0}
    (workdir / "sizes.json").write_text(json.dumps(sizes))
    assert "Whole transformer: 0.00 of its bf16 bytes" in read(workdir)


def test_phases_are_where_the_logged_rank_changes():
    spans = phases(list(records()))
    assert [(span.start, span.rank) for span in spans] == [(0, 4), (12, 2), (24, 1), (36, 0)]
    assert len(column(list(records()), "small_singular_share")[0]) == 36


def test_a_workdir_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match="Train first"):
        write_report(tmp_path)


def test_a_broken_file_is_named(workdir):
    (workdir / "sizes.json").write_text("{")
    with pytest.raises(UserError, match=r"sizes\.json does not read as JSON"):
        write_report(workdir)


def test_alarms_and_updates_left_out_are_told_and_escaped(workdir):
    alarms = [{"step": step, "alarm": f"the loss is <{step}>"} for step in range(22)]
    (workdir / "alarms.jsonl").write_text("\n".join(map(json.dumps, alarms)) + '\n{"step": 3')
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "loss": 0.1, "skipped": 3}) + "\n")
    page = read(workdir)
    assert "<li>Step 0: the loss is &lt;0&gt;.</li>" in page
    assert page.count("<li>Step") == 20
    assert "<li>3 more in <code>alarms.jsonl</code>.</li>" in page


def test_a_run_without_alarms_tells_of_none(page):
    assert "alarms" not in page.partition("<body")[2].partition("Do it again")[0]


@pytest.mark.parametrize(
    "name", ["../../secret.mp4", "/etc/hostname", "..", "", "a\0", "\ud800", 3]
)
def test_samples_name_files_beside_them(workdir, name):
    pairs = json.loads((workdir / "samples/samples.json").read_text())
    pairs[0]["student"] = name
    (workdir / "samples/samples.json").write_text(json.dumps(pairs))
    with pytest.raises(UserError, match=r"than the name of a file beside it at \[0\].student"):
        write_report(workdir)


@pytest.mark.parametrize(
    ("file", "content", "place"),
    [
        ("sizes.json", 3, "an object at its top"),
        ("sizes.json", {"transformer_bf16_bytes": "5"}, "a number at transformer_bf16_bytes"),
        ("evaluation.json", {"variants": [3]}, "a number at videos"),
        ("config.json", {"quant": [4]}, "an object at quant"),
        ("validation.jsonl", {"step": 10**30}, "a number at step"),
        ("validation.jsonl", {"step": 1, "layers": {"x": 3}}, "an object at layers.x"),
        ("validation.jsonl", {"step": 1, "cosine": ["x"]}, r"a number or null at cosine\[0\]"),
        ("metrics.jsonl", {"step": 10**400}, "a number at step"),
        ("metrics.jsonl", {"step": 1, "loss": 10**400}, "a number of float32's range at loss"),
        ("metrics.jsonl", {"step": 1, "rank": "4"}, "a number of float32's range at rank"),
        ("alarms.jsonl", {"step": 10**400, "alarm": "x"}, "a number at step"),
        ("alarms.jsonl", {"step": 1, "alarm": 3}, "a string at alarm"),
    ],
)
def test_a_file_of_another_shape_is_told_where(workdir, file, content, place):
    (workdir / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{file}.* has something else than {place}"):
        write_report(workdir)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The folder of a report on everything."""
    return write_report(add_everything(make_workdir(tmp_path_factory.mktemp("run")))).parent


def test_measures_and_speed_appear_with_their_intervals(full):
    page = (full / "index.html").read_text("utf-8")
    for text in (
        "22.0<small>20.5 to 23.5",
        "0.900<small>0.880 to 0.920",
        "−0.0041<small>−0.0061 to −0.0021",
        "0.90<small>0.80 to 1.00",
        "0.90 s",
        "1.67 MB",
        "not measured",
        "by full precision’s",
    ):
        assert text in page, text


def test_every_variant_of_a_prompt_stands_in_one_row(full):
    page = (full / "index.html").read_text("utf-8")
    row = page.partition('<figure class="take"')[2].partition("</figure>")[0]
    assert re.findall(r'src="([^"]*)"', row) == [
        f"videos/evaluation/videos/{order}-1000.mp4" for order in range(3)
    ]
    assert page.count('<figure class="take"') == 4, "two judged, one sampled, one while training"
    assert 'data-frames="17" data-fps="8"' in page


def test_what_no_judge_knows_is_reported_by_its_measures(workdir):
    add_everything(workdir)
    (workdir / "validation.jsonl").unlink()
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    for each in evaluation["variants"]:
        for key in ("strict", "plain", "shape", "colour", "direction", "strict_difference"):
            each.pop(key)
    (workdir / "evaluation.json").write_text(json.dumps(evaluation | {"videos": 512}))
    page = read(workdir)
    assert "the frames match at 22.0 dB PSNR (20.5 to 23.5)" in page
    assert "No judge knows these prompts" in page
    assert "reads every video" not in page


def test_held_out_errors_are_lines_over_steps_and_missing_lists_are_left_out():
    rows = [validation(12), validation(24) | {"relative": None}, validation(36)]
    lines = lines_by_timestep(rows, "relative")
    assert list(lines) == [57, 250, 555, 747, 949]
    assert lines[57] == ([12, 36], [rows[0]["relative"][0], rows[2]["relative"][0]])
    assert lines_by_timestep(rows, "normalised") == {}


def test_layers_are_grouped_as_models_name_them():
    names = ["blocks.1.attn1.to_q", "blocks.0.attn1.to_q", "transformer_blocks.10.ff.up"]
    names += ["blocks.ffn.down", "condition_embedder.time_proj", "proj_out"]
    groups = group_layers({name: {} for name in names})
    assert {group: [(row.block, row.linear) for row in rows] for group, rows in groups.items()} == {
        "attn1": [(0, "to_q"), (1, "to_q")],
        "ff": [(10, "up")],
        "ffn": [(None, "down")],
        "condition_embedder": [(None, "time_proj")],
        "proj_out": [(None, "proj_out")],
    }


def test_pages_of_layers_are_named_by_plain_characters_and_differ():
    names = page_names(["attn1", "ATTN1", "../../x", "é", ""])
    assert len(set(names.values())) == 5
    assert all(re.fullmatch(r"layers-[a-z0-9-]*\.html", name) for name in names.values())


def test_every_group_of_layers_has_a_page(full):
    names = {path.name for path in full.glob("*.html")}
    assert names == {"index.html", "layers-attn1.html", "layers-ffn.html", "layers-proj-out.html"}


def test_names_of_layers_are_texts_and_no_formulas(workdir):
    layers = {rf"blocks.{block}.ffn.$\frac{{up}}$": layer(block, 0) for block in range(2)}
    (workdir / "validation.jsonl").write_text(json.dumps({"step": 1, "layers": layers}))
    page = write_report(workdir).with_name("layers-ffn.html").read_text("utf-8")
    assert r">$\frac{up}$</text>" in page


def test_headings_skip_no_level_and_every_label_says_something(full):
    for path in full.glob("*.html"):
        page = path.read_text("utf-8")
        levels = [0, *map(int, re.findall(r"<h(\d)", page))]
        assert all(after <= before + 1 for before, after in pairwise(levels)), path.name
        assert 'aria-label=""' not in page


def test_a_variant_without_verdicts_has_no_empty_drawing(workdir):
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    for key in ("strict", "plain"):
        evaluation["variants"][0].pop(key)
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    assert 'aria-label=""' not in read(workdir)


def test_a_layer_page_shows_every_layer_of_its_group(full):
    page = (full / "layers-ffn.html").read_text("utf-8")
    assert len(re.findall(r'<th scope="row"[^>]*>blocks\.\d\.ffn\.(?:up|down)', page)) == 8
    assert page.count('<svg class="curve"') == 3
    bare = (full / "layers-proj-out.html").read_text("utf-8")
    assert "no branch" in bare
    assert bare.count("Nothing to draw: see the table.") == 3


@pytest.mark.parametrize("path", ["../x.mp4", "/etc/hostname", "a/../../x", "a//b", "", "a\\b", 3])
@pytest.mark.parametrize("name", ["evaluation/videos.json", "validation.jsonl"])
def test_paths_of_videos_stay_inside_the_workdir(workdir, name, path):
    (workdir / "evaluation").mkdir()
    pair = {"prompt": "a", "seed": 1, "teacher": path, "student": path, "videos": {"x": path}}
    content = [pair] if name.endswith("json") else {"step": 1, "videos": [pair]}
    (workdir / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="something else than a path inside the workdir"):
        write_report(workdir)


def test_numbers_keep_the_digits_that_count():
    shown = [significant(x) for x in (0.05, 123.4, 1234.0, 1.2e-5, -0.5, float("nan"), None)]
    assert shown == ["0.0500", "123", "1.23·10³", "1.20·10⁻⁵", "−0.500", "–", "–"]
    assert [signed(x, 1) for x in (0.04, -0.04, 1, -1)] == ["0.0", "0.0", "+1.0", "−1.0"]


def test_a_script_in_a_prompt_is_shown_and_not_run(workdir):
    pairs = json.loads((workdir / "samples/samples.json").read_text())
    pairs[0]["prompt"] = "\"><script>alert('x')</script>"
    (workdir / "samples/samples.json").write_text(json.dumps(pairs))
    page = write_report(workdir).read_text()
    assert "<script>alert" not in page
    assert page.count("&quot;&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 3
