"""Section: what is recorded about the store, the autoencoder and the analysis. Tested in test_page.py."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from analysis.report.data import Results
from analysis.report.markup import EN_DASH, Section, show


def section(results: Results) -> Section:
    lists = []
    for title, key in (("Activations", "store"), ("Autoencoder", "sae"), ("Analysis", "analysis")):
        facts = results.get("provenance", key)
        rows = "".join(
            f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{_value(value)}</td></tr>"
            for name, value in _flat(facts if isinstance(facts, dict) else {})
        )
        lists.append(f'<div><h3>{title}</h3><table class="facts"><tbody>{rows}</tbody></table></div>')
    took = f" The analysis took {show(results.get('seconds'))} s." if results.number("seconds") is not None else ""
    note = f'<p class="note">An en dash: not recorded, or not used.{took}</p>'
    return Section("Provenance", f'<div class="columns narrow">{"".join(lists)}</div>{note}')


def _flat(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}: {inner}", item) for inner, item in _flat(value))
        else:
            yield name, value


def _value(value: Any) -> str:
    """A recorded value as escaped HTML; consecutive whole numbers as "0 to 29"."""
    if value is None or value == "":
        return EN_DASH
    if isinstance(value, list):
        if len(value) > 2 and value == list(range(value[0], value[0] + len(value))):
            return f"{value[0]} to {value[-1]}"
        return escape(", ".join(str(item) for item in value)) or EN_DASH
    if isinstance(value, float):
        return show(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"<code>{escape(value)}</code>" if isinstance(value, str) else escape(str(value))
