"""Writes docs/configuration.md from the types of `negfast.config`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from negfast.config import PRESETS, Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Written by `make docs` from `negfast/config.py`; do not edit.

The last one wins: defaults, `--preset`, a TOML file, `--set section.key=value`. `RUN/config.toml` holds all settings of
a run. Unknown keys, bad values, contradictions and settings that do nothing beside others are refused. A default with a
decimal point takes any number of the range, one without an integer.

A resumed run keeps its settings, except those that cannot change results: `train.device`, `threads`, `accumulate`,
`token_budget`, `prefetch`, `checkpoint_every`, `tensorboard`.

```sh
negfast train my.toml --data data --out runs/a --set grpo.steps=4 --set reward.like_penalty=0.2
```
"""


def configuration_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in fields(Config):
        kind = section.type
        assert isinstance(kind, type)
        about = (kind.__doc__ or "").strip() if not (kind.__doc__ or "").startswith(f"{kind.__name__}(") else ""
        parts += [f"## {section.name}\n", *([about + "\n"] if about else [])]
        parts += ["| key | default | range | what |", "|---|---|---|---|"]
        for field in fields(kind):
            text = field.metadata["help"].replace("|", "\\|")
            parts.append(
                f"| `{field.name}` | `{_shown(field.default)}` | {_range(field.type, field.metadata)} | {text} |"
            )
        parts.append("")
    parts += ["## Presets\n", "| preset | differs by |", "|---|---|"]
    for name, tree in PRESETS.items():
        changes = [f"`{s}.{k}={_shown(v)}`" for s, values in tree.items() for k, v in values.items()]
        parts.append(f"| `{name}` | {', '.join(changes) or 'nothing: the defaults'} |")
    return "\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _range(kind: Any, bounds: Any) -> str:
    if bounds["choices"]:
        return ", ".join(f"`{choice}`" for choice in bounds["choices"])
    if kind is bool:
        return "`true`, `false`"
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    if low is not None and high is not None:
        return f"{low:.10g}..{high:.10g}"
    return f">={low:.10g}" if low is not None else f">{above:.10g}" if above is not None else "text"


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), "utf-8")
