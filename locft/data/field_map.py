"""A field map says where a file has fields of an edit that no layout finds: {prompt: question, rephrases: [q1, q2]}."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from locft.errors import InputError, did_you_mean

FieldMap = Mapping[str, Sequence[str]]
"""Fields of an edit (`MAPPED`) and the paths of their keys in the records of a file."""

MAPPED = (
    "prompt", "target", "subject", "id", "ground_truth", "rephrases", "locality", "locality.prompt", "locality.answer",
    "portability", "portability.prompt", "portability.answer",
)  # fmt: skip
"""The fields that a map may name."""


def read_field_map(value: Any) -> FieldMap:
    """A field map from a study file or an option: a key or a list of keys for each field, or, for locality and
    portability, for their prompt and answer. Raises InputError with every problem."""
    problems: list[str] = []
    found: dict[str, tuple[str, ...]] = {}
    if not isinstance(value, Mapping):
        raise InputError(f"got {value!r}, expected a mapping of fields to keys, such as {{prompt: question}}")
    flat = {
        f"{name}.{part}" if part else name: keys
        for name, given in value.items()
        for part, keys in (given.items() if isinstance(given, Mapping) else [("", given)])
    }
    for name, keys in flat.items():
        listed = (keys,) if isinstance(keys, str) else keys
        if name not in MAPPED:
            problems.append(
                f"got the field {name}, expected one of {', '.join(MAPPED)}{did_you_mean(str(name), MAPPED)}"
            )
        elif not isinstance(listed, list | tuple) or not listed or not all(isinstance(k, str) and k for k in listed):
            problems.append(f"{name}: got {keys!r}, expected a key or a list of keys")
        elif len(listed) > 1 and name in ("prompt", "target"):
            problems.append(f"{name}: got {len(listed)} keys, expected one")
        else:
            found[name] = tuple(listed)
    for name in ("locality", "portability"):
        problems += _unpaired(name, flat, found)
    if problems:
        raise InputError(problems)
    return found


def _unpaired(name: str, given: Mapping[str, Any], found: FieldMap) -> Iterator[str]:
    """Mismatches between the prompts and the answers of locality or portability."""
    prompts, answers = found.get(f"{name}.prompt", found.get(name, ())), found.get(f"{name}.answer", ())
    if name in given and f"{name}.prompt" in given:
        yield f"got both {name} and {name}.prompt, expected one of them"
    elif f"{name}.answer" in given and not {name, f"{name}.prompt"} & given.keys():
        yield f"{name}.answer: also needs the key of its prompts, {name}.prompt"
    elif len(prompts) > 1 and len(answers) > 1 and len(prompts) != len(answers):
        got = f"got {len(answers)} answer keys for {len(prompts)} prompt keys"
        yield f"{name}.answer: {got}, expected one key, or one per prompt key"
