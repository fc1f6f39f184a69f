"""Configuration of the documentation's site: ``make docs`` builds it in English and Russian."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import airflow_provider_datasphere

#: Pages that are files of the repository's root: their links are to docs/, ours to the pages beside.
ROOT_PAGES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}


def read_root_page(app: Any, name: str, source: list[str]) -> None:
    """Put the text of a root page in the place of its stub."""
    if name in ROOT_PAGES:
        source[0] = Path(app.srcdir).parent.joinpath(ROOT_PAGES[name]).read_text().replace("](docs/", "](")


def setup(app: Any) -> None:
    app.connect("source-read", read_root_page)


project = "airflow-provider-datasphere"
author = "airflow-provider-datasphere contributors"
version = release = airflow_provider_datasphere.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["locale/**", "_build/**"]
templates_path = ["_templates"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 4
locale_dirs = ["locale"]
gettext_compact = False
gettext_uuid = False
gettext_location = False
gettext_last_translator = ""
gettext_language_team = ""

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": False}
copybutton_prompt_text = "$ "

html_theme = "pydata_sphinx_theme"
html_title = "DataSphere Jobs for Airflow"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "images/logo.svg"
html_show_sourcelink = False
html_sidebars = {"**": ["globaltoc.html"]}
html_theme_options = {
    "navbar_center": [],
    "github_url": "https://github.com/airflow-provider-datasphere/airflow-provider-datasphere",
    "navbar_end": ["language", "theme-switcher", "navbar-icon-links"],
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}
copyright = "airflow-provider-datasphere contributors, Apache License 2.0. Not affiliated with Yandex"
