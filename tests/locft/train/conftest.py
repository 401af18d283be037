"""A model and edits that trainings are tried on."""

import pytest

from tests.tiny import EDITS, edit_rows, tiny_loaded


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def rows(loaded):
    return edit_rows(loaded, EDITS)
