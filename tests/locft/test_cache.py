"""Files of the cache appear whole or not at all. (Folders made once: with the models that need them, test_models.)"""

from locft.cache import write_atomically


def test_atomic_write_replaces_whole_files(tmp_path):
    file = tmp_path / "sub" / "note.txt"
    write_atomically(file, "first")
    write_atomically(file, "zweite Fassung, länger")
    assert file.read_text(encoding="utf-8") == "zweite Fassung, länger"
    assert [f.name for f in file.parent.iterdir()] == ["note.txt"]
