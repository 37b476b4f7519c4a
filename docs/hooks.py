"""What mkdocs calls while it builds the site; the contents come from `pages`."""

from __future__ import annotations

from typing import Any

import pages
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


def on_config(config: Any) -> Any:
    """Put a page for every structure into the navigation."""
    for entry in config.nav:
        if "Structures" in entry:
            entry["Structures"] += [{name: pages.page_of(name)} for name in pages.structures()]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files that are not written in docs/."""
    for path, content in pages.generated().items():
        files.append(File.generated(config, path, content=content))
    for notebook in sorted((pages.ROOT / "notebooks").glob("*.ipynb")):
        path = f"notebooks/{notebook.name}"
        files.append(File(path, str(pages.ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in tables and pictures."""
    return pages.filled(markdown)
