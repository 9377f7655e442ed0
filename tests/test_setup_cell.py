"""The set-up cell and the links: written by one script, with a fork's own address."""

import subprocess
import sys

import nbformat
import pytest
from notebook_runs import NOTEBOOKS

sys.path.insert(0, str(NOTEBOOKS.parent / "tools"))
import sync_setup  # noqa: E402

ADDRESS = "https://github.com/owner/name"


def tagged(notebook, tag):
    return [cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_stored_cells_are_those_that_the_script_writes_for_one_address():
    stored = {path: nbformat.read(path, as_version=4) for path in sync_setup.notebooks()}
    [address] = {sync_setup.stored_address(notebook) for notebook in stored.values()}
    for path, notebook in stored.items():
        assert tagged(notebook, "set-up") == [sync_setup.set_up_cell(address)], path
        assert tagged(notebook, "nav") == [sync_setup.nav_cell(path, address)], path
        assert "nav" in notebook.cells[0].metadata.tags, path
        texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        assert [text for text in texts if sync_setup.linked(text, path) != text] == [], path


def test_a_mention_of_another_notebook_becomes_a_link_once():
    path = NOTEBOOKS / "solutions" / "01_teacher_solutions.ipynb"
    text = sync_setup.linked("See notebook 02, appendix A1 and notebook 99.", path)
    assert "[notebook 02](../02_soft_labels_and_temperature.ipynb)" in text
    assert "[appendix A1](../A1_how_distill_works.ipynb) and notebook 99." in text
    assert sync_setup.linked(text, path) == text
    own = "This is notebook 02."
    assert sync_setup.linked(own, NOTEBOOKS / "02_soft_labels_and_temperature.ipynb") == own


@pytest.mark.parametrize(
    "remote, found",
    [
        ("https://github.com/owner/name.git", ADDRESS),
        ("https://user:secret@github.com/owner/name/", ADDRESS),
        ("git@github.com:owner/name.git", ADDRESS),
        ("https://gitlab.com/group/team/my.name", "https://gitlab.com/group/team/my.name"),
        ("/srv/git/name.git", ""),
        ("https://127.0.0.1:8000/owner/name", ""),
    ],
)
def test_an_address_is_taken_from_a_remote_that_others_can_reach(remote, found):
    assert sync_setup.public_address(remote) == found


def test_a_forks_remote_comes_before_pyproject(tmp_path, monkeypatch):
    monkeypatch.setattr(sync_setup, "ROOT", tmp_path)
    urls = '[project]\n[project.urls]\nRepository = "https://github.com/first/name"\n'
    (tmp_path / "pyproject.toml").write_text(urls)
    assert sync_setup.address() == "https://github.com/first/name"  # no git yet
    git = ["git", "-C", tmp_path]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "git@github.com:fork/name"], check=True)
    assert sync_setup.address() == "https://github.com/fork/name"


def test_an_address_reaches_the_badge_and_the_set_up_cell():
    path = sync_setup.notebooks()[0]
    assert f"%pip install -q git+{ADDRESS}\n" in sync_setup.set_up_cell(ADDRESS)
    badge = f"https://colab.research.google.com/github/owner/name/blob/main/notebooks/{path.name}"
    assert badge in sync_setup.nav_cell(path, ADDRESS)
    for elsewhere in ("", "https://gitlab.com/owner/name"):
        assert "colab" not in sync_setup.nav_cell(path, elsewhere)
    assert "wheel" in sync_setup.set_up_cell("")


def test_writing_an_address_leaves_all_else_as_it_is(tmp_path, monkeypatch):
    original = sync_setup.notebooks()[0]
    monkeypatch.setattr(sync_setup, "ROOT", tmp_path)
    copy = tmp_path / "notebooks" / original.name
    copy.parent.mkdir()
    copy.write_bytes(original.read_bytes())
    for address in (ADDRESS, None):  # and when the notebook is run again
        sync_setup.sync(copy, address)
        changed = nbformat.read(copy, as_version=4)
        assert sync_setup.stored_address(changed) == ADDRESS
    for old, new in zip(nbformat.read(original, as_version=4).cells, changed.cells, strict=True):
        assert new == old or {"set-up", "nav"} & set(old.metadata.tags)
