"""How to do the run again: its command, configuration and environment."""

import json
from html import escape

from qvgen_jax.evaluation.report.words import missing


def rerun_section(config: dict, evaluation: dict | None) -> str:
    seed = config.get("seed")
    seed = (
        missing("The seed was not recorded.")
        if seed is None
        else f"<p>Everything random in training follows from seed {escape(str(seed))}.</p>"
    )
    versions = (evaluation or {}).get("versions") or {}
    told = " · ".join(f"{escape(k)} <b>{escape(str(v))}</b>" for k, v in versions.items())
    return (
        (
            f"<pre>{escape(config['command'])}</pre>"
            if config.get("command")
            else missing("The command was not recorded.")
        )
        + seed
        + (f'<p class="versions">{told}</p>' if told else missing("Versions: not recorded."))
        + (
            "<details><summary>The whole configuration, with overrides</summary>"
            f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"
            if config
            else missing("<code>config.json</code> is missing: no configuration to show.")
        )
    )
