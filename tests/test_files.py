"""Files that are whole or as they were."""

from pathlib import Path

import pytest

from nasattn.files import whole


@pytest.mark.parametrize("shared", [False, True])
def test_a_draft_takes_the_files_place_or_leaves_nothing(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path, shared=shared) as draft:
        draft.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("weights", "old")]
    with whole(path, shared=shared) as draft:
        draft.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("weights", "new")]


def test_drafts_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with whole(path, shared=True) as one, whole(path, shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with whole(path) as draft:
        draft.write_text("old")
        left = draft
    left.write_text("left")
    with whole(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
