"""Build the documentation's site in both languages into dist/docs: ``make docs``. Every warning is an error.

The Russian catalogues must have each paragraph as the English page has it today; ``--update`` writes what is new into
them, to be translated.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from babel.messages.pofile import read_po

PROJECT = Path(__file__).resolve().parents[1]
DOCS, TARGET = PROJECT / "docs", PROJECT / "dist" / "docs"
CATALOGUES = DOCS / "locale" / "ru" / "LC_MESSAGES"
#: Pages that stay English: the reference is made of docstrings.
UNTRANSLATED = {"reference"}
_REDIRECT = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=en/index.html">\n'
#: What must be the same in both languages: code, and the targets of links.
_FIXED = re.compile(r"`[^`]+`|\]\([^)]+\)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write new and changed paragraphs into the catalogues")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        os.environ.setdefault("AIRFLOW_HOME", folder)
        templates = Path(folder, "templates")
        sphinx("gettext", templates)
        for name in ("sphinx", "docs", *UNTRANSLATED):
            (templates / f"{name}.pot").unlink(missing_ok=True)
        if options.update:
            update(templates)
            return 0
        if faults := check(templates):
            print("\n".join(faults), file=sys.stderr)
            print(f"{len(faults)} faults in the Russian catalogues: make docs-update, then translate.", file=sys.stderr)
            return 1
    shutil.rmtree(TARGET, ignore_errors=True)
    for language in ("en", "ru"):
        sphinx("html", TARGET / language, "-D", f"language={language}")
        shutil.rmtree(TARGET / language / ".doctrees", ignore_errors=True)
    (TARGET / "index.html").write_text(_REDIRECT)
    shutil.copyfile(PROJECT / "llms.txt", TARGET / "llms.txt")
    print(f"The site is in {TARGET.relative_to(PROJECT)}: en/index.html, ru/index.html")
    return 0


def sphinx(builder: str, target: Path, *options: str) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, *options, DOCS, target]
    subprocess.run(command, check=True)


def update(templates: Path) -> None:
    command = [sys.executable, "-m", "sphinx_intl", "update", "-p", templates, "-d", DOCS / "locale", "-l", "ru"]
    subprocess.run(command, check=True)


def check(templates: Path) -> list[str]:
    """Return what is missing in the catalogues, or stale."""
    faults = []
    for template in sorted(templates.glob("*.pot")):
        path = CATALOGUES / f"{template.stem}.po"
        if not path.exists():
            faults.append(f"{path.name}: there is no such catalogue")
            continue
        with template.open("rb") as file:
            wanted = {str(message.id) for message in read_po(file) if message.id}
        with path.open("rb") as file:
            found = {str(message.id): message for message in read_po(file, locale="ru") if message.id}
        for text in sorted(wanted):
            message = found.get(text)
            short = text[:70].replace("\n", " ")
            if message is None or not message.string or message.fuzzy:
                faults.append(f"{path.name}: not translated: {short}…")
            elif sorted(_FIXED.findall(text)) != sorted(_FIXED.findall(str(message.string))):
                faults.append(f"{path.name}: code or links differ: {short}…")
        faults += [f"{path.name}: stale: {text[:70]}…" for text in sorted(set(found) - wanted)]
    return faults


if __name__ == "__main__":
    sys.exit(main())
