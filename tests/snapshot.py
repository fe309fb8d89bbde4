"""A committed record of counts that no run of the tests may change unnoticed."""

import json
from pathlib import Path

PATH = Path(__file__).parent / "snapshots" / "work.json"


def read():
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(section, found):
    """Replace a section; those that cannot be measured here stay."""
    sections = read() | {section: found}
    PATH.parent.mkdir(exist_ok=True)
    parts = []
    for name, entries in sorted(sections.items()):
        lines = (f"  {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    PATH.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def flat(entry, prefix=""):
    """Fields of an entry, those of inner dicts by a path."""
    fields = {}
    for name, value in entry.items():
        inner = flat(value, f"{prefix}{name}: ") if isinstance(value, dict) else None
        fields |= {f"{prefix}{name}": value} if inner is None else inner
    return fields


def differences(before, after):
    """Lines that say what changed, and whether every change is to less."""
    lines, less = [], True
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            lines.append(f"{name}: {'not recorded yet' if name in after else 'gone'}")
            less = False
            continue
        old, new = flat(before[name]), flat(after[name])
        changed = [key for key in {**old, **new} if old.get(key, 0) != new.get(key, 0)]
        lines += [f"{name}:"] if changed else []
        for key in changed:
            was, now = old.get(key, 0), new.get(key, 0)
            lines.append(f"    {key}  {was} -> {now}")
            less &= type(was) is type(now) is int and now < was
    return lines, less


def complaint(before, after, remedy):
    """What to tell who changed the counts; empty where nothing changed."""
    lines, less = differences(before, after)
    if not lines:
        return ""
    verdict = "Less work everywhere, an improvement: " if less else "If this is meant to be so, "
    return "\n".join([*lines, f"{verdict}`{remedy}` records it; commit that with the change."])
