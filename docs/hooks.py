"""What mkdocs calls while it builds the site; the contents come from `pages`, what is refused from `checks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checks
import pages
from mkdocs.exceptions import PluginError
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
    texts = [file.content_string for file in files.documentation_pages() if file.src_path.endswith(".md")]
    if missing := checks.undocumented(texts, checks.public_names()):
        raise PluginError(f"no page says what these public names are (::: module.name): {', '.join(missing)}")
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in tables and pictures."""
    return pages.filled(markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Links of a notebook lead to files of the repository; here to the pages that these become."""
    return pages.notebook_links(html) if page.file.src_path.endswith(".ipynb") else html


def on_post_build(config: Any) -> None:
    """Follow every link of the built pages, also of those that mkdocs does not write itself."""
    if broken := list(checks.broken_links(Path(config.site_dir).resolve())):
        raise PluginError("links that lead nowhere:\n" + "\n".join(broken))
