"""Conversations like those that chat models are trained on: lists of turns, each with its speaker and what is said.

One user question and its answer are an edit; in a longer conversation nobody can say which answer is the edit.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from locft.data.record_files import FileRecord

_LISTS = ("messages", "conversations", "conversation")
_SPEAKER, _SAID = ("role", "from"), ("content", "value")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def turns_of(value: Mapping[str, Any]) -> list[tuple[str, Any]] | None:
    """(role, text) of each turn of a record; None if it is not a conversation. Roles are user, assistant and system, or
    else as the file names them."""
    turns: list[Any] = next((value[key] for key in _LISTS if isinstance(value.get(key), list) and value[key]), [])
    found = [(_first(turn, _SPEAKER), _first(turn, _SAID)) for turn in turns if isinstance(turn, Mapping)]
    if not found or len(found) < len(turns) or any(not isinstance(role, str) for role, _ in found):
        return None
    return [(_ROLES.get(role.lower(), role), _text(said)) for role, said in found]


def question_and_answer(record: FileRecord, source: str) -> FileRecord:
    """The record, with a conversation's question as `instruction`, its answer as `output` and its system prompt as `system`.
    A conversation with anything else in it becomes a record with a problem."""
    turns = turns_of(record.value)
    if turns is None:
        return record
    texts = dict(turns)
    if [role for role, _ in turns if role != "system"] != ["user", "assistant"] or len(texts) < len(turns):
        key = next(key for key in _LISTS if record.value.get(key))
        said = f"{len(turns)} turns ({', '.join(role for role, _ in turns[:6])}{', …' if len(turns) > 6 else ''})"
        expected = "one question of the user and its answer, with at most one system prompt before them"
        problem = f"{source}, {record.place}, field {key}: expected {expected}, got {said}"
        return replace(record, value={}, problem=problem)
    rest = {key: inside for key, inside in record.value.items() if key not in _LISTS}
    system = {"system": texts["system"]} if texts.get("system") else {}
    return replace(record, value={**rest, "instruction": texts["user"], "output": texts["assistant"], **system})


def _first(turn: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((turn[key] for key in keys if key in turn), None)


def _text(said: Any) -> Any:
    """What is said: a list of text parts as one text, one part per line; anything else as it is."""
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in said] if isinstance(said, list) else []
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if texts and len(texts) == len(parts) else said
