"""An evaluation as Markdown: what the judge found, what the pixels say, what it costs."""

from collections.abc import Mapping


def table(result: Mapping) -> str:
    """The tables of `evaluation.json`: the judge's where it judged, measures, and speed."""
    rows = result["variants"]
    parts = [judged(result)] if "strict" in rows[0] else []
    return "\n\n".join([*parts, _measures(rows), _speed(rows)])


def judged(result: Mapping) -> str:
    """The judge's table."""
    heads = ("plain", "strict", "strict, paired difference (95 %)", "latents differ by")
    lines = []
    for line in result["variants"]:
        cells = [line["name"]]
        for key in ("plain", "strict"):
            share = line[key]
            low, high = (100 * end for end in share["interval"])
            percent = 100 * share["count"] / share["total"]
            cells.append(
                f"{percent:.1f} % ({share['count']}/{share['total']}, {low:.1f} to {high:.1f})"
            )
        paired = line["strict_difference"]
        if paired is None:
            cells += ["reference", "0"]
        else:
            low, high = (100 * end for end in paired["interval"])
            cells.append(f"{100 * paired['mean']:+.1f} points ({low:+.1f} to {high:+.1f})")
            cells.append(f"{line['latent_difference']:.3f}")
        lines.append(cells)
    return _lines(heads, lines)


def _measures(rows: list[Mapping]) -> str:
    heads = ("PSNR, dB", "SSIM", "consistency, difference (95 %)", "motion, ratio (95 %)")
    formats = (
        ("psnr", "{:.1f}"),
        ("ssim", "{:.3f}"),
        ("consistency_difference", "{:+.4f}"),
        ("motion", "{:.3f}"),
    )
    lines = []
    for line in rows:
        metrics = line["metrics"]
        if metrics is None:
            lines.append([line["name"], *["reference"] * len(heads)])
        else:
            lines.append([line["name"], *[_told(metrics[key], form) for key, form in formats]])
    return _lines(heads, lines)


def _speed(rows: list[Mapping]) -> str:
    heads = ("seconds a video", "of full precision's", "weights, MB", "most bytes at once, MB")
    lines = []
    for line in rows:
        speed = line["speed"]
        ratio, peak = speed["ratio_to_reference"], speed["peak_bytes"]
        cells = [f"{speed['seconds_per_video']:.4g}"]
        cells += ["not comparable" if ratio is None else f"{ratio:.3g}"]
        cells += [f"{speed['weights_bytes'] / 1e6:.4g}"]
        cells += ["not known" if peak is None else f"{peak / 1e6:.4g}"]
        lines.append([line["name"], *cells])
    return _lines(heads, lines)


def _told(estimate: Mapping | None, form: str) -> str:
    if estimate is None:
        return "none"
    mean, low, high = (form.format(each) for each in (estimate["mean"], *estimate["interval"]))
    return f"{mean} ({low} to {high})"


def _lines(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])
