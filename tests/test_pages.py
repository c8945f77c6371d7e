"""What the pages say beside their doctests: links, examples, the command line. (That every public name is in the
reference is checked where it is built: docs/_ext/public_names.py.)"""

import argparse
import io
import re
import runpy
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import nbbn.__main__ as command_line

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
REFERENCE = (ROOT / "docs/reference/command-line.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def anchors(page):
    """The names that GitHub, and MyST after it, give to the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in (match[1] or match[2] for match in LINK.finditer(text)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


def test_broken_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('# A head-line, or two\n[a](no.md) [b](#no) [c](#a-head-line-or-two) [d](page.md#no) <img src="e">')
    assert list(broken_links(page)) == ["no.md", "#no", "page.md#no", "e"]


def test_the_reference_has_every_command_and_option():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for add in (command_line.add_demo, command_line.add_info, command_line.add_warmup):
        add(commands)
    for name, command in commands.choices.items():
        assert f"`python -m nbbn {name}`" in REFERENCE
        options = {o for action in command._actions for o in action.option_strings if o not in ("-h", "--help")}
        assert {o for o in options if not re.search(rf"`{o}\b", REFERENCE)} == set()


def test_the_reference_has_every_environment_variable():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nbbn").rglob("*.py"))
    read = set(re.findall(r"[\"'](NBBN_[A-Z_]+)[\"']", sources))
    assert read, "nbbn reads its variables by name"
    assert {name for name in read if f"`{name}`" not in REFERENCE} == set()


def test_the_check_of_the_reference_knows_what_pages_import():
    source = (ROOT / "docs/_ext/public_names.py").read_text(encoding="utf-8")
    checked = re.search(r"^MODULES = \((.*)\)", source, re.MULTILINE)[1]
    outside = [page.read_text(encoding="utf-8") for page in PAGES if page.name != "architecture.md"]
    imported = set(re.findall(r"(?:import|from) (nbbn(?:\.compat)?\.\w+)", "".join(outside)))
    assert {"nbbn.compat.v1", "nbbn.torch"} <= imported
    assert {name for name in imported if f'"{name}"' not in checked} == set()


DOCSTRING = """Sums *x* where `mask` is |set|.

    y = sum(x * mask)

Args:
    x: float array. mask, out: bools,
        which last: as they are.
    a to c: kept. **kwargs: of sum().
    The others: of
        no use.
Returns: y, of the
    shape of x.
"""
RST = """Sums \\*x\\* where ``mask`` is \\|set\\|.

::

    y = sum(x * mask)

:Arguments:

    ``x``
        float array.

    ``mask``, ``out``
        bools, which last\\: as they are.

    ``a`` to ``c``
        kept.

    ``**kwargs``
        of sum().

    The others\\: of no use.


:Returns:

    y, of the shape of x.
"""


def test_docstrings_become_restructuredtext():
    convert = runpy.run_path(str(ROOT / "docs/_ext/docstrings.py"))["rst"]
    assert "\n".join(convert(DOCSTRING.splitlines(), ["x", "mask", "out", "a", "c", "kwargs"])).strip() == RST.strip()


def test_the_training_example_learns(capsys):
    runpy.run_path(str(ROOT / "docs/examples/training.py"))
    assert float(capsys.readouterr().out.split()[-1]) > 0.95  # guessing has 0.5


def test_the_serving_example_answers():
    example = runpy.run_path(str(ROOT / "docs/examples/serving.py"))
    layer = example["trained_layer"]()
    server = example["make_server"](layer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def post(x):
        body = io.BytesIO()
        np.save(body, x)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(url, body.getvalue()) as answer:
            return np.load(io.BytesIO(answer.read()))

    try:
        x = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
        np.testing.assert_array_equal(post(x), layer(x))
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            post(x[:, :2])
        assert "3" in str(np.load(io.BytesIO(refused.value.read())))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
