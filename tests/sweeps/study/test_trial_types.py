"""What a result says of its edits."""

import dataclasses

from analysis.stats.table import pack_right, unpack_right
from tests.mlflow_store import result


def answers(*marks, kind="reliability"):
    return tuple({"edit_id": edit, "kind": kind, "format": form, "correct": right} for edit, form, right in marks)


def test_which_edits_are_right_is_told_by_format_without_the_unseen_wording():
    marks = [
        ("a", "raw", True), ("a", "chat", False), ("a", "unseen", True),
        ("b", "raw", True), ("b", "chat", True), ("b", "unseen", False),
    ]  # fmt: skip
    outcomes = (*answers(*marks), *answers(("a", "raw", False), kind="generalization"))
    found = dataclasses.replace(result(), outcomes=outcomes)
    assert unpack_right(found.right).tolist() == [0.5, 1.0]
    raw = dataclasses.replace(result(), outcomes=answers(*[mark for mark in marks if mark[1] == "raw"]))
    assert raw.right == pack_right([True, True])
    assert dataclasses.replace(result(), outcomes=(), packed_right="2:x").right == "2:x"
