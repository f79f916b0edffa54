"""Records of a study that never ran, with known differences between its variants."""

import numpy as np

from configs.study_tiny import get_config
from qvgen_jax.study import record
from qvgen_jax.study.grid import Cell, digest, read_cells, relevant

STEPS = 240


def grid(stage: str, /, **changes) -> dict:
    return {**get_config(stage).to_dict(), **changes}


def cells(stage: str, names: tuple[str, ...], /, **changes) -> list[Cell]:
    return read_cells(grid(stage, **changes), names)


def run_lines(cell: Cell, step_loss: float = 0.1) -> list[dict]:
    """What metrics.jsonl of a run of the cell may hold."""
    rng = np.random.default_rng(cell.seed)
    rank = cell.config["quant"]["rank"]
    lines = []
    for step in range(0, STEPS, 4):
        phase = step // 20
        alive = rank // 2**phase if rank else 0
        line = {
            "step": step,
            "loss": step_loss * (1 + 2 * np.exp(-step / 40)) * rng.uniform(0.9, 1.1),
            "grad_norm": (1 + 3 * (rank == 0)) * np.exp(-step / 100) * rng.uniform(0.8, 1.2),
            "rank": float(alive),
            "gate": 0.5,
            "lr_weights": 1e-3,
            "steps_per_second": 0.01 if step == 0 else 2.0 if alive else 4.0,
        }
        if alive:
            line["small_singular_share"] = step / STEPS
        lines.append(line)
    return lines


def synthetic(cell: Cell, loss: float, strict: float = 0.9, videos: int = 60) -> dict:
    """A record whose held-out loss and strict share are as said."""
    rng = np.random.default_rng([cell.seed, 7])
    clips = loss * np.linspace(0.8, 1.2, 16) + 1e-3 * rng.normal(size=16)
    hits = "".join("01"[index < strict * videos] for index in range(videos))
    lines = run_lines(cell, loss)
    return {
        "stage": cell.stage,
        "variant": cell.variant,
        "bits": cell.bits,
        "seed": cell.seed,
        "digest": digest(cell.config),
        "config": relevant(cell.config),
        "code": {"commit": "0123456789abcdef", "dirty": False},
        "timesteps": list(range(50, 950, 100)),
        "seconds_per_step": record.seconds_per_step(lines),
        "curves": record.curves(lines),
        "held_out": {
            "clips": 16,
            "mean": {"normalised": float(clips.mean())},
            "per_clip": clips.tolist(),
        },
        "drift": {
            "videos": 8,
            "relative": 2 * loss,
            "per_video": np.linspace(loss, 3 * loss, 8).tolist(),
            "motion": 0.97,
        },
        "judge": [
            {"name": "Full precision", "strict_videos": "1" * videos},
            {"name": "QVGen", "strict_videos": hits, "latent_difference": loss},
        ]
        if cell.stage == "finals"
        else None,
        "sizes": {"transformer_export_bytes": 1_140_000},
    }
