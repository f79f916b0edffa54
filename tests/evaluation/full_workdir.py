"""Stand-ins for what evaluation and validation write, in their formats: for tests of the report."""

import json

import av
import numpy as np

FRAMES, FPS = 17, 8
PROMPTS = ("a red star moving up", "a blue ring moving down-left slowly on a white background")
VARIANTS = ("Full precision", "Round-to-nearest W4A4", "QVGen W4A4")
TIMESTEPS = (57, 250, 555, 747, 949)
STEPS = (12, 24, 36, 48, 59)


def write_video(path, shade, size=(64, 64)):
    """A square that moves right, so that every frame differs from the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in range(FRAMES):
            image = np.full((height, width, 3), 200, np.uint8)
            left = frame * (width - 20) // FRAMES
            image[height // 3 : height // 3 + 20, left : left + 20] = shade
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def estimate(mean, spread):
    return {"mean": mean, "interval": [mean - spread, mean + spread]}


def measures(order):
    """Of the variant with this number; none of the first, which is the reference."""
    speed = {"seconds_per_video": 1.5 - 0.3 * order, "ratio_to_reference": 1 - 0.2 * order}
    speed |= {"weights_bytes": 5e6 / (1 + order), "peak_bytes": None if order else 9e7}
    metrics = {
        "psnr": estimate(20.0 + order, 1.5),
        "ssim": estimate(0.8 + 0.05 * order, 0.02),
        "consistency": estimate(0.981, 0.003),
        "consistency_difference": estimate(-0.0041, 0.002),
        "motion": estimate(0.9, 0.1),
    }
    return {"metrics": metrics if order else None, "speed": speed}


def layer(block, order):
    values = [2.0**-i / (1 + order) for i in range(8 - block)]
    found = {"weight_error": 0.05 + 0.01 * block + 0.004 * order, "branch_norm": 0.5 / (1 + order)}
    return found | {"singular_values": values, "clip_low": 0.9 - 0.02 * block, "clip_high": 0.94}


def layers():
    linears = {
        "attn1": ("to_q", "to_k", "to_v", "to_out"),
        "ffn": ("up", "down"),
    }
    found = {
        f"blocks.{block}.{group}.{linear}": layer(block, order)
        for group, names in linears.items()
        for order, linear in enumerate(names)
        for block in range(4)
    }
    bare = {"weight_error": 0.02, "branch_norm": None, "singular_values": None}
    return found | {"proj_out": bare | {"clip_low": 0.95, "clip_high": 0.95}}


def validation(step):
    """One line of `validation.jsonl`."""
    relative = [0.4 / (1 + step / 20) + 0.05 * i for i in range(len(TIMESTEPS))]
    line = {"step": step, "timesteps": TIMESTEPS, "relative": relative, "drift": {"relative": 0.5}}
    line |= {"cosine": [1 - x**2 / 2 for x in relative], "normalised": None, "layers": layers()}
    videos = {"teacher": "validation/teacher/0.mp4", "student": f"validation/{step}/0.mp4"}
    return line | {"videos": [{"prompt": PROMPTS[0], "seed": 3, **videos}]}


def add_everything(workdir, size=(64, 64)):
    """Add all that the report knows to what `test_report.make_workdir` made."""
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    first, last = evaluation["variants"]
    middle = last | {"name": VARIANTS[1], "latent_difference": 0.41}
    middle["strict"] = {"count": 12, "total": 16, "interval": [0.51, 0.9]}
    evaluation["variants"] = [
        variant | measures(order) for order, variant in enumerate((first, middle, last))
    ]
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    rows = []
    for seed, prompt in enumerate(PROMPTS, 1000):
        videos = {}
        for order, name in enumerate(VARIANTS):
            videos[name] = f"evaluation/videos/{order}-{seed}.mp4"
            write_video(workdir / videos[name], (200, 40 * order, 0), size)
        rows.append({"prompt": prompt, "seed": seed, "videos": videos})
    (workdir / "evaluation" / "videos.json").write_text(json.dumps(rows))
    for order, name in enumerate(("samples/teacher_000.mp4", "samples/student_000.mp4")):
        write_video(workdir / name, (0, 90, 120 + 80 * order), size)
    write_video(workdir / "validation/teacher/0.mp4", (200, 0, 0), size)
    for step in STEPS:
        write_video(workdir / f"validation/{step}/0.mp4", (200, step, 0), size)
    lines = [json.dumps(validation(step)) for step in STEPS]
    (workdir / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return workdir
