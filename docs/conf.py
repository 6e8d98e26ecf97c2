"""Sphinx: the site that `make docs` builds into build/docs. Strict (-W), and without a network, then and afterwards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import lightning_tilt

project = "lightning_tilt"
author = copyright = "The lightning_tilt developers"
release = version = lightning_tilt.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "api_pages",
    "built_links",
    "docstrings",
    "loss_table",
    "mathml",
    "notebook_pages",
]
exclude_patterns = ["_ext"]
suppress_warnings = ["myst.header"]  # parts of other files are included, whose first header is of the second level

# Pages are Markdown that reads well in the repository too.
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
myst_fence_as_directive = ["loss-table", "loss-pictures"]
html_math_renderer = "mathml"

# Every reference of ours must arrive; those to other packages would need their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!lightning_tilt).*"), ("py:class", r".*\.[A-Z]")]  # the second: type variables
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True

highlight_language = "text"  # formulas in docstrings are no Python
html_theme = "furo"
html_title = f"lightning_tilt {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
